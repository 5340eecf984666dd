// One token of Mamba's inner block: convolution, projections, scan and gate. Bound by memory: every weight and state
// is read once, as it lies, and nothing that lies between is written but for a few vectors a sequence.
#include "native/math.h"
#include "native/parallel.h"
#include "native/tiles.h"

namespace ssmzoo {

struct MambaStepArguments {
    void *conv_state, *ssm_state;                  // S: (b w-1 d), (b d n), contiguous
    const void *x, *z;                             // T: (b d)
    const void *conv_weight, *conv_bias;           // S: (d w), (d) or null
    const void *x_proj, *dt_proj;                  // T: (r + 2n, d), (d r), contiguous
    const void *dt_bias, *A_log, *D;               // S: (d), (d n), (d)
    void* y;                                       // T: (b d)
    void *inputs, *maps;                           // S: scratch (b d), (b r+2n)
    int64_t dtype, batch, d, n, width, rank, normalised, threads, x_batch, z_batch;
    double eps;
};

namespace SSMZOO_ISA {
namespace {

// x of one tile of channels through the convolution and silu → inputs.
template <class T>
void convolve(const MambaStepArguments& a, int64_t batch, int64_t first, int64_t channels, char* scratch) {
    typedef typename Sum<T>::type S;
    const int64_t w = a.width;
    S* weight = reinterpret_cast<S*>(scratch);
    S* bias = weight + w * kTile;
    read_transposed(weight, at<S>(a.conv_weight, first * w), w, channels, S(1));
    read_parameters(bias, a.conv_bias, first, channels);
    S* state = static_cast<S*>(a.conv_state) + batch * (w - 1) * a.d + first;
    for (int64_t c = 0; c < channels; c += Lanes<S>::count) {
        auto now = read_some(at<T>(a.x, batch * a.x_batch + first + c), channels - c);
        auto sum = fma(load(weight + (w - 1) * kTile + c), now, load(bias + c));
        for (int64_t j = w - 2; j >= 0; --j) {  // the newest first: each input moves one place towards the oldest
            const auto older = read_some(state + j * a.d + c, channels - c);
            sum = fma(load(weight + j * kTile + c), older, sum);
            write_some(state + j * a.d + c, now, channels - c);
            now = older;
        }
        write_some(static_cast<S*>(a.inputs) + batch * a.d + first + c, silu<S>(sum), channels - c);
    }
}

// The sum over k of row_k x_k, in four interleaved parts.
template <class T, class S>
S dot(const T* row, const S* x, int64_t size) {
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count;
    V sums[4] = {};
    int64_t k = 0;
    for (; k + 4 * lanes <= size; k += 4 * lanes)
        for (int i = 0; i < 4; ++i) sums[i] = fma(read(row + k + i * lanes), load(x + k + i * lanes), sums[i]);
    for (; k < size; k += lanes) sums[0] = fma(read_some(row + k, size - k), read_some(x + k, size - k), sums[0]);
    V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return sum_lanes<S, 1>(&sum)[0];
}

// Each of Δ's part, B and C over its root mean square.
template <class S>
void normalise(const MambaStepArguments& a, S* maps) {
    const int64_t sizes[3] = {a.rank, a.n, a.n};
    for (int64_t size : sizes) {
        const S squares = dot(maps, maps, size);
        const S scale = S(1) / S(__builtin_sqrt(double(squares / S(size) + S(a.eps))));
        for (int64_t i = 0; i < size; ++i) maps[i] *= scale;
        maps += size;
    }
}

// As many channels as a vector has lanes, or fewer, from the first on: Δ, the recurrence, skip and gate → y.
template <class T>
void advance(const MambaStepArguments& a, int64_t batch, int64_t first, int64_t channels) {
    typedef typename Sum<T>::type S;
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count;
    const int64_t n = a.n, r = a.rank;
    const S* delta = static_cast<const S*>(a.maps) + batch * (r + 2 * n);
    const S *B = delta + r, *C = B + n;
    V sums[lanes];
    for (int c = 0; c < lanes; ++c) {
        sums[c] = V{};
        if (c >= channels) continue;
        const T* row = at<T>(a.dt_proj, (first + c) * r);
        for (int64_t k = 0; k < r; k += lanes)
            sums[c] = fma(read_some(row + k, r - k), read_some(delta + k, r - k), sums[c]);
    }
    const V dt = softplus<S>(sum_lanes<S, lanes>(sums) + read_some(at<S>(a.dt_bias, first), channels));
    const V u = read_some(static_cast<const S*>(a.inputs) + batch * a.d + first, channels);
    S steps[lanes], inputs[lanes];
    store(steps, dt);
    store(inputs, dt * u);
    for (int c = 0; c < lanes; ++c) {
        sums[c] = V{};
        if (c >= channels) continue;
        const S* A_log = at<S>(a.A_log, (first + c) * n);
        S* h = static_cast<S*>(a.ssm_state) + (batch * a.d + first + c) * n;
        const V step = splat(-steps[c]), input = splat(inputs[c]);
        for (int64_t j = 0; j < n; j += lanes) {
            const int64_t count = n - j;
            const V rate = exp<S>(read_some(A_log + j, count)) * splat(Constants<S>::log2e);
            const V decay = exp2_product<S, true>(step, rate);
            const V now = fma(decay, read_some(h + j, count), input * read_some(B + j, count));
            write_some(h + j, now, count);
            sums[c] = fma(now, read_some(C + j, count), sums[c]);
        }
    }
    V y = fma(read_some(at<S>(a.D, first), channels), u, sum_lanes<S, lanes>(sums));
    y = y * silu<S>(read_some(at<T>(a.z, batch * a.z_batch + first), channels));
    write_some(static_cast<T*>(a.y) + batch * a.d + first, y, channels);
}

template <class T>
int mamba_step(const MambaStepArguments& a) {
    typedef typename Sum<T>::type S;
    const int64_t tiles = ceil_div(a.d, kTile), outputs = a.rank + 2 * a.n;
    const size_t bytes = sizeof(S) * static_cast<size_t>((a.width + 1) * kTile);
    // For one sequence the convolution is too little work to be worth waking threads for.
    int result = parallel_for(a.batch * tiles, a.batch > 8 ? a.threads : 1, bytes, [&](int64_t i, char* scratch) {
        const int64_t first = i % tiles * kTile;
        convolve<T>(a, i / tiles, first, minimum(kTile, a.d - first), scratch);
    });
    if (result) return result;
    S* maps = static_cast<S*>(a.maps);
    constexpr int64_t rows = 8;  // a task's
    result = parallel_for(ceil_div(outputs, rows), a.threads, 0, [&](int64_t task, char*) {
        for (int64_t row = task * rows; row < minimum(outputs, (task + 1) * rows); ++row)
            for (int64_t batch = 0; batch < a.batch; ++batch)
                maps[batch * outputs + row] = dot(at<T>(a.x_proj, row * a.d),
                                                  static_cast<const S*>(a.inputs) + batch * a.d, a.d);
    });
    if (result) return result;
    if (a.normalised)
        for (int64_t batch = 0; batch < a.batch; ++batch) normalise(a, maps + batch * outputs);
    return parallel_for(a.batch * tiles, a.threads, 0, [&](int64_t i, char*) {
        const int64_t batch = i / tiles, tile = i % tiles * kTile;
        for (int64_t first = tile; first < minimum(a.d, tile + kTile); first += Lanes<S>::count)
            advance<T>(a, batch, first, minimum(a.d - first, Lanes<S>::count));
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(mamba_step)(const ssmzoo::MambaStepArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    switch (a->dtype) {
        case 0: return mamba_step<float>(*a);
        case 1: return mamba_step<double>(*a);
        case 2: return mamba_step<bfloat16>(*a);
        default: return mamba_step<float16>(*a);
    }
}
