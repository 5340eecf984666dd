// Root-mean-square normalisation, backward. With q = 1 / sqrt(mean(v^2) + eps) over a group of m channels, and e the
// gradient of v q weight:
//
//     dv = q weight e - v q^3 / m sum(weight e v)      dweight = sum_rows e v q
//
// dweight is summed over the rows of each of at most 64 fixed parts, then over the parts in their order, so that
// threads change nothing.
#include "native/exports.h"
#include "native/rows.h"
#include "rms_norm/cpu.h"

namespace ssmzoo {

struct NormBackwardArguments {
    NormArguments forward;                  // residual is the sum that the forward pass returned; y, summed unused
    const void *dy, *dsummed;               // T: (rows d); R: (rows d) or null
    void *dx, *dweight, *dgate, *dresidual; // T: (rows d); S: (d); T, R: (rows d) or null, contiguous
    void* parts;                            // S: (64 d), zeros
    int64_t dy_row, dsummed_row;
};

namespace SSMZOO_ISA {
namespace {

constexpr int64_t kParts = 64;

// The dtype of the residual and of its sum with x.
inline int64_t residual_dtype(const NormArguments& a) { return a.residual_wide ? a.dtype == 1 : a.dtype; }

// Numbers of a row in scratch memory, which is written in whole vectors.
inline int64_t row_size(const NormArguments& a) { return ceil_div(a.d, kTile) * kTile; }

// One row (d) of a tensor of this dtype; null where there is none.
template <class S>
const S* whole_row(const NormArguments& a, int64_t dtype, const void* from, int64_t offset, S* scratch) {
    return rows<S>(dtype, from, offset, a.d, 1, a.d, scratch).p;
}

template <class S>
void row_backward(const NormBackwardArguments& args, int64_t row, S* dweight, S* scratch) {
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count;
    const NormArguments& a = args.forward;
    const int64_t size = row_size(a), dtype = a.dtype, wide = residual_dtype(a);
    S *own = scratch, *of_gate = own + size, *of_dy = of_gate + size, *of_dsummed = of_dy + size;
    const S* r = a.residual ? whole_row(a, wide, a.residual, row * a.residual_row, own)
                            : whole_row(a, dtype, a.x, row * a.x_row, own);
    const S* gate = whole_row(a, dtype, a.gate, row * a.gate_row, of_gate);
    const S* dy = whole_row(a, dtype, args.dy, row * args.dy_row, of_dy);
    const S* dsummed = whole_row(a, wide, args.dsummed, row * args.dsummed_row, of_dsummed);
    const S* weight = at<S>(a.weight, 0);
    // Each vector over one that is used up
    const Results<S> to_dx = {args.dx, dtype, row * a.d, a.d, of_dy, false};
    const Results<S> to_dgate = {args.dgate, dtype, row * a.d, a.d, of_gate, false};
    const Results<S> to_dresidual = {args.dresidual, wide, row * a.d, a.d, of_dsummed, false};
    S *dx = to_dx.row(0), *dgate = to_dgate.row(0), *dresidual = args.dresidual ? to_dresidual.row(0) : nullptr;
    const V one = splat(S(1));
    for (int64_t first = 0; first < a.d; first += a.group) {
        V squares = {}, products = {};
        for (int64_t c = first; c < first + a.group; c += lanes) {
            const int64_t count = first + a.group - c;
            const V v = inside<S>(r, gate, a.gate_first, c, count);
            V e = read_some(dy + c, count) * read_some(weight + c, count);
            if (gate && !a.gate_first) e = e * silu<S>(read_some(gate + c, count));
            squares = fma(v, v, squares);
            products = fma(v, e, products);
        }
        const S root = inverse_root<S>(sum_of<S>(squares), a.group, a.eps);
        const V q = splat(root), pull = splat(root * root * root * sum_of<S>(products) / S(a.group));
        for (int64_t c = first; c < first + a.group; c += lanes) {
            const int64_t count = first + a.group - c;
            const V v = inside<S>(r, gate, a.gate_first, c, count), w = read_some(weight + c, count);
            V e = read_some(dy + c, count), dv;
            if (gate) {
                const V g = read_some(gate + c, count), sigma = sigmoid<S>(g), through = g * sigma;
                const V slope = sigma * fma(g, one - sigma, one);
                if (a.gate_first) {
                    dv = fma(-v, pull, q * w * e);
                    write_some(dgate + c, dv * read_some(r + c, count) * slope, count);
                    dv = dv * through;
                } else {
                    write_some(dgate + c, e * v * q * w * slope, count);
                    e = e * through;
                    dv = fma(-v, pull, q * w * e);
                }
            } else {
                dv = fma(-v, pull, q * w * e);
            }
            write_some(dweight + c, fma(e * v, q, read_some(dweight + c, count)), count);
            if (dsummed) dv = dv + read_some(dsummed + c, count);
            write_some(dx + c, dv, count);
            if (dresidual) write_some(dresidual + c, dv, count);
        }
    }
    to_dx.finish(1, a.d);
    if (gate) to_dgate.finish(1, a.d);
    if (dresidual) to_dresidual.finish(1, a.d);
}

template <class S>
int norm_backward(const NormBackwardArguments& args) {
    const NormArguments& a = args.forward;
    const int64_t rows = ceil_div(a.rows, kParts);
    S* parts = static_cast<S*>(args.parts);
    const size_t bytes = is_half(a.dtype) ? sizeof(S) * static_cast<size_t>(4 * row_size(a)) : 0;
    const int result = parallel_for(kParts, a.threads, bytes, [&](int64_t i, char* scratch) {
        for (int64_t row = i * rows; row < minimum(a.rows, (i + 1) * rows); ++row)
            row_backward(args, row, parts + i * a.d, reinterpret_cast<S*>(scratch));
    });
    if (result) return result;
    return parallel_for(ceil_div(a.d, kTile), a.threads, 0, [&](int64_t tile, char*) {
        for (int64_t c = tile * kTile; c < minimum(a.d, (tile + 1) * kTile); c += Lanes<S>::count) {
            const int64_t count = minimum(a.d, (tile + 1) * kTile) - c;
            typename Lanes<S>::V sum = {};
            for (int64_t i = 0; i < kParts; ++i) sum = sum + read_some(parts + i * a.d + c, count);
            write_some(static_cast<S*>(args.dweight) + c, sum, count);
        }
    });
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_SUMS(rms_norm_backward, NormBackwardArguments, forward.dtype, norm_backward)
