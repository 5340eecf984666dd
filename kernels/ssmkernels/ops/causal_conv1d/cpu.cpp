// The causal depthwise convolution, forward, and its step: y_t = bias + sum_j weight_j x_{t-(w-1)+j}, through silu.
#include "causal_conv1d/cpu.h"
#include "causal_conv1d/cpu_step.h"
#include "native/exports.h"
#include "native/pairs.h"

namespace ssmzoo {

struct ConvStepArguments {
    void* state;                      // S: (b w-1 d), contiguous
    const void *x, *weight, *bias;    // (b d); S: (d w), (d) or null
    void* y;                          // (b d)
    int64_t dtype, batch, d, width, silu, threads, x_batch;
};

namespace SSMZOO_ISA {
namespace {

template <class T, int fixed_width>
void conv_block(const ConvArguments& a, const Block& b, int64_t first, int64_t channels, char* scratch) {
    typedef typename Sum<T>::type S;
    S* rows = reinterpret_cast<S*>(scratch);
    S* weight = rows + (kBlock + a.width - 1) * kTile;
    S* bias = weight + a.width * kTile;
    read_inputs<T>(a, b, first, channels, b.t0 - (a.width - 1), b.t0 + b.steps, rows);
    read_transposed(weight, at<S>(a.weight, first * a.width), a.width, channels, S(1));
    read_parameters(bias, a.bias, first, channels);
    T* y = static_cast<T*>(a.y) + (b.batch * a.length + b.start + b.t0) * a.d + first;
    for (int64_t c = 0; c < channels; c += Lanes<S>::count) {
        const Taps<S, fixed_width> taps(weight + c, bias + c, a.width);
        for (int64_t t = 0; t < b.steps; ++t) {
            auto sum = taps(rows + c, t);
            if (a.silu) sum = silu<S>(sum);
            write_some(y + t * a.d + c, sum, channels - c);
        }
    }
    if (!b.last) return;
    S* state = static_cast<S*>(a.final_state) + b.sequence * (a.width - 1) * a.d + first;
    for (int64_t k = 0; k < a.width - 1; ++k)
        memcpy(state + k * a.d, rows + (b.steps + k) * kTile, sizeof(S) * static_cast<size_t>(channels));
}

// A whole tile at a time, as in conv_block bit for bit, but straight from the input: the w-1 rows before the present
// one stay in registers, and only those before the block go through scratch memory.
template <class T, int w>
void conv_stream(const ConvArguments& a, const Block& b, int64_t first, char* scratch) {
    typedef typename Sum<T>::type S;
    using V = typename Lanes<S>::V;
    constexpr int lanes = Lanes<S>::count, side = SSMZOO_VECTOR_BYTES == 32 ? 2 : 4;  // vectors side by side
    static_assert(kTile % (side * lanes) == 0, "vectors fill a tile");
    S* before = reinterpret_cast<S*>(scratch);
    S* weight = before + (w - 1) * kTile;
    S* bias = weight + w * kTile;
    read_inputs<T>(a, b, first, kTile, b.t0 - (w - 1), b.t0, before);
    read_transposed(weight, at<S>(a.weight, first * w), w, kTile, S(1));
    read_parameters(bias, a.bias, first, kTile);
    const T* x = at<T>(a.x, b.batch * a.x_batch + (b.start + b.t0) * a.x_time + first);
    T* y = static_cast<T*>(a.y) + (b.batch * a.length + b.start + b.t0) * a.d + first;
    for (int64_t c = 0; c < kTile; c += side * lanes) {
        V rows[w][side], taps[w][side];
        for (int j = 0; j < w; ++j)
            for (int i = 0; i < side; ++i) {
                taps[j][i] = load(weight + j * kTile + c + i * lanes);
                if (j < w - 1) rows[j][i] = load(before + j * kTile + c + i * lanes);
            }
        for (int64_t t = 0; t < b.steps; ++t) {
            V sums[side];
            for (int i = 0; i < side; ++i) {
                rows[w - 1][i] = read(x + t * a.x_time + c + i * lanes);
                V sum = load(bias + c + i * lanes);
                for (int j = 0; j < w; ++j) sum = fma(taps[j][i], rows[j][i], sum);
                for (int j = 0; j < w - 1; ++j) rows[j][i] = rows[j + 1][i];
                sums[i] = a.silu ? silu<S>(sum) : sum;
            }
            for (int i = 0; i < side; i += 2) write_pair(y + t * a.d + c + i * lanes, sums[i], sums[i + 1]);
        }
    }
    if (!b.last) return;
    S* state = static_cast<S*>(a.final_state) + b.sequence * (w - 1) * a.d + first;
    S* ends = weight;  // no longer needed
    read_inputs<T>(a, b, first, kTile, b.t0 + b.steps - (w - 1), b.t0 + b.steps, ends);
    for (int64_t k = 0; k < w - 1; ++k) memcpy(state + k * a.d, ends + k * kTile, sizeof(S) * kTile);
}

template <class T>
int conv(const ConvArguments& a) {
    typedef typename Sum<T>::type S;
    const int64_t tiles = ceil_div(a.d, kTile);
    const size_t bytes = sizeof(S) * static_cast<size_t>((kBlock + 2 * a.width) * kTile);
    return parallel_for(count_blocks(a) * tiles, a.threads, bytes, [&](int64_t i, char* scratch) {
        Block b;
        if (!find_block(a, i / tiles, &b)) return;
        const int64_t first = i % tiles * kTile, channels = minimum(kTile, a.d - first);
        if (a.width == 4 && channels == kTile) return conv_stream<T, 4>(a, b, first, scratch);
        if (a.width == 4) return conv_block<T, 4>(a, b, first, channels, scratch);
        if (a.width == 3) return conv_block<T, 3>(a, b, first, channels, scratch);
        if (a.width == 2) return conv_block<T, 2>(a, b, first, channels, scratch);
        conv_block<T, 0>(a, b, first, channels, scratch);
    });
}

template <class T>
int conv_step(const ConvStepArguments& a) {
    typedef typename Sum<T>::type S;
    const int64_t tiles = ceil_div(a.d, kTile), w = a.width;
    const size_t bytes = sizeof(S) * static_cast<size_t>(conv_step_scratch(w));
    return parallel_step(a.batch * tiles, a.threads, bytes, [&](int64_t i, char* scratch) {
        const int64_t batch = i / tiles, first = i % tiles * kTile;
        conv_step_tile(static_cast<S*>(a.state) + batch * (w - 1) * a.d + first, a.d,
                       at<T>(a.x, batch * a.x_batch + first), at<S>(a.weight, first * w),
                       a.bias ? at<S>(a.bias, first) : nullptr, w, a.silu != 0,
                       static_cast<T*>(a.y) + batch * a.d + first, minimum(kTile, a.d - first),
                       reinterpret_cast<S*>(scratch));
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(causal_conv1d, ConvArguments, dtype, conv)

SSMZOO_EXPORT_DTYPES(causal_conv1d_step, ConvStepArguments, dtype, conv_step)
