// The rotary embedding of one token of each sequence, whose position is how many tokens came before, and the counting.
#include "angles.h"
#include "exports.h"
#include "half.h"

namespace ssmzoo {

struct RotaryArguments {
    const void* x;             // (rows, heads, 2 half), rows of contiguous numbers
    const int32_t* positions;  // (rows)
    const void* frequency;     // S: (half), radians a token
    void* y;                   // (rows, heads, 2 half), contiguous
    int64_t dtype, rows, heads, half, x_row;
};

struct CountArguments {
    int32_t* counts;  // (rows)
    int64_t rows;
};

namespace SSMZOO_ISA {
namespace {

// y_c = x_c cos - x_{c + half} sin and y_{c + half} = x_{c + half} cos + x_c sin. An angle is rounded to S, as a
// product of position and frequency is elsewhere. A turn is taken away in parts, the first two of which have 30 bits:
// times fewer than 2^23 turns, they are exact.
template <class T>
int rotary(const RotaryArguments& a) {
    typedef typename Sum<T>::type S;
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count;
    constexpr double radian = 0.15915494309189535, turn[] = {6.283185303211212, 3.9683743166540886e-09, 2.068073192717642e-18};
    const S* frequency = static_cast<const S*>(a.frequency);
    for (int64_t row = 0; row < a.rows; ++row)
        for (int64_t c = 0; c < a.half; c += lanes) {
            const int64_t left = a.half - c;
            V turns = {};
            for (int64_t i = 0; i < lanes && i < left; ++i) {
                const double angle = double(S(S(a.positions[row]) * frequency[c + i]));
                const double whole = double(int64_t(angle * radian + 0.5));
                turns[i] = S((((angle - whole * turn[0]) - whole * turn[1]) - whole * turn[2]) * radian);
            }
            S sines[lanes], cosines[lanes];
            sine_cosine<S>(turns, sines, cosines);
            const V sine = load(sines), cosine = load(cosines);
            for (int64_t h = 0; h < a.heads; ++h) {
                const T* x = static_cast<const T*>(a.x) + row * a.x_row + h * 2 * a.half + c;
                T* y = static_cast<T*>(a.y) + (row * a.heads + h) * 2 * a.half + c;
                const V first = read_some(x, left), second = read_some(x + a.half, left);
                write_some(y, first * cosine - second * sine, left);
                write_some(y + a.half, second * cosine + first * sine, left);
            }
        }
    return 0;
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(rotary, RotaryArguments, dtype, rotary)

SSMZOO_EXPORT(count)(const ssmzoo::CountArguments* a) {
    for (int64_t i = 0; i < a->rows; ++i) ++a->counts[i];
    return 0;
}
