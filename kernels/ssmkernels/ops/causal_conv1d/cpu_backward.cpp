// The causal depthwise convolution, backward. With p_t the gradient of the sum before silu, 0 beyond the sequence:
//
//     dx_t = sum_j weight_j p_{t+(w-1)-j}      dweight_j = sum_t p_t x_{t-(w-1)+j}      dbias = sum_t p_t
//
// A block computes p for its own steps and the w-1 behind them. Sums over time are made in two steps: over the blocks
// of one of at most 64 fixed groups, then over the groups in their order, so that threads change nothing.
#include "causal_conv1d/cpu.h"
#include "native/exports.h"

namespace ssmzoo {

struct ConvBackwardArguments {
    ConvArguments forward;               // y and final_state unused
    const void *dy, *dfinal;             // (b l d); S: (s w-1 d) or null
    void *dx, *dweight, *dbias, *dinitial;  // (b l d), contiguous; S: (d w), (d) or null, (s w-1 d) or null
    int64_t dy_batch, dy_time;
};

namespace SSMZOO_ISA {
namespace {

constexpr int64_t kGroups = 64;

template <class T, int fixed_width>
void block_backward(const ConvBackwardArguments& args, const Block& b, int64_t first, int64_t channels,
                    const typename Sum<T>::type* weight, const typename Sum<T>::type* bias,
                    typename Sum<T>::type* sums, typename Sum<T>::type* rows) {
    typedef typename Sum<T>::type S;
    using V = typename Lanes<S>::V;
    const ConvArguments& a = args.forward;
    const int64_t w = fixed_width ? fixed_width : a.width, before = w - 1;
    const int64_t steps = b.steps + before;  // of p
    S* p = rows + (kBlock + 2 * before) * kTile;
    read_inputs<T>(a, b, first, channels, b.t0 - before, b.t0 + steps, rows);
    const T* dy = at<T>(args.dy, b.batch * args.dy_batch + (b.start + b.t0) * args.dy_time + first);
    T* dx = static_cast<T*>(args.dx) + (b.batch * a.length + b.start + b.t0) * a.d + first;
    const S* dfinal = args.dfinal ? at<S>(args.dfinal, b.sequence * before * a.d + first) : nullptr;
    for (int64_t c = 0; c < channels; c += Lanes<S>::count) {
        const int64_t count = channels - c;
        const Taps<S, fixed_width> taps(weight + c, bias + c, w);
        for (int64_t t = 0; t < steps; ++t) {
            V slope = {};
            if (b.t0 + t < b.length) {
                slope = read_some(dy + t * args.dy_time + c, count);
                if (a.silu) {
                    const V sum = taps(rows + c, t), sigma = sigmoid<S>(sum);
                    slope = slope * sigma * fma(sum, splat<S>(S(1)) - sigma, splat<S>(S(1)));
                }
            }
            store(p + t * kTile + c, slope);
        }
        // Of the input at time t0 + t; t runs below 0 for the initial state's part
        const auto of_input = [&](int64_t t) {
            V sum = {};
            for (int64_t j = 0; j < w; ++j) {
                const int64_t later = t + before - j;
                if (later >= 0) sum = fma(load(weight + j * kTile + c), load(p + later * kTile + c), sum);
            }
            const int64_t k = b.t0 + t - (b.length - before);  // its place in the final state
            if (dfinal && k >= 0) sum = sum + read_some(dfinal + k * a.d + c, count);
            return sum;
        };
        for (int64_t t = 0; t < b.steps; ++t) write_some(dx + t * a.d + c, of_input(t), count);
        if (b.t0 == 0 && args.dinitial)
            for (int64_t t = -before; t < 0; ++t) {
                S* to = static_cast<S*>(args.dinitial) + (b.sequence * before + before + t) * a.d + first + c;
                write_some(to, of_input(t), count);
            }
        for (int64_t j = 0; j < w; ++j) {
            V sum = load(sums + j * kTile + c);
            for (int64_t t = 0; t < b.steps; ++t)
                sum = fma(load(p + t * kTile + c), load(rows + (t + j) * kTile + c), sum);
            store(sums + j * kTile + c, sum);
        }
        V sum = load(sums + w * kTile + c);
        for (int64_t t = 0; t < b.steps; ++t) sum = sum + load(p + t * kTile + c);
        store(sums + w * kTile + c, sum);
    }
}

template <class T>
int conv_backward(const ConvBackwardArguments& args) {
    typedef typename Sum<T>::type S;
    const ConvArguments& a = args.forward;
    const int64_t tiles = ceil_div(a.d, kTile), blocks = count_blocks(a), w = a.width;
    const int64_t group_size = ceil_div(blocks, kGroups), groups = blocks ? ceil_div(blocks, group_size) : 0;
    const int64_t sums_size = (w + 1) * kTile;
    const Scratch memory(sizeof(S) * static_cast<size_t>(groups * tiles * sums_size));
    if (!memory.data) return kOutOfMemory;
    S* const all_sums = reinterpret_cast<S*>(memory.data);
    const size_t bytes = sizeof(S) * static_cast<size_t>((2 * kBlock + 4 * w) * kTile + sums_size);
    const int failed = parallel_for(groups * tiles, a.threads, bytes, [&](int64_t i, char* scratch) {
        const int64_t group = i / tiles, first = i % tiles * kTile, channels = minimum(kTile, a.d - first);
        S* sums = all_sums + i * sums_size;
        S* weight = reinterpret_cast<S*>(scratch);
        S* bias = weight + w * kTile;
        S* rows = bias + kTile;
        memset(sums, 0, sizeof(S) * static_cast<size_t>(sums_size));
        read_transposed(weight, at<S>(a.weight, first * w), w, channels, S(1));
        read_parameters(bias, a.bias, first, channels);
        for (int64_t number = group * group_size; number < minimum(blocks, (group + 1) * group_size); ++number) {
            Block b;
            if (!find_block(a, number, &b)) continue;
            if (w == 4) block_backward<T, 4>(args, b, first, channels, weight, bias, sums, rows);
            else if (w == 3) block_backward<T, 3>(args, b, first, channels, weight, bias, sums, rows);
            else if (w == 2) block_backward<T, 2>(args, b, first, channels, weight, bias, sums, rows);
            else block_backward<T, 0>(args, b, first, channels, weight, bias, sums, rows);
        }
    });
    return failed || parallel_for(tiles, a.threads, 0, [&](int64_t i, char*) {
        for (int64_t c = 0; c < minimum(kTile, a.d - i * kTile); ++c)
            for (int64_t j = 0; j <= w; ++j) {
                S sum = 0;
                for (int64_t group = 0; group < groups; ++group)
                    sum += all_sums[(group * tiles + i) * sums_size + j * kTile + c];
                if (j < w) static_cast<S*>(args.dweight)[(i * kTile + c) * w + j] = sum;
                else if (args.dbias) static_cast<S*>(args.dbias)[i * kTile + c] = sum;
            }
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(causal_conv1d_backward, ConvBackwardArguments, forward.dtype, conv_backward)
