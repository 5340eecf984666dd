// The rotary embedding of one token of each sequence, whose position is how many tokens came before, and the counting.
// Results lie side by side, or in a cache, at the place that each sequence has come to.
#include "angles.h"
#include "exports.h"
#include "half.h"

namespace ssmzoo {

struct RotaryArguments {
    const void* x;             // (rows, heads, width), rows of contiguous numbers
    const int32_t* positions;  // (rows)
    const void* frequency;     // S: (half), radians a token
    void* y;                   // (pages, page_size, heads, width), of contiguous channels
    const int32_t* places;     // (rows), which token of its sequence each is in a cache; null: of row i, page i has one
    const int32_t* table;      // (rows, blocks), the page of each block of a row; null: row i has page i
    int64_t dtype, rows, heads, half, width, x_row, page_size, y_page, y_position, y_head, table_row, table_block;
};

struct CountArguments {
    int32_t* counts;  // (rows)
    int64_t rows;
};

namespace SSMZOO_ISA {
namespace {

// y_c = x_c cos - x_{c + half} sin and y_{c + half} = x_{c + half} cos + x_c sin. An angle is rounded to S, as a
// product of position and frequency is elsewhere. A turn is taken away in parts, the first two of which have 30 bits:
// times fewer than 2^23 turns, they are exact. Channels from 2 half on stay as they are.
template <class T>
int rotary(const RotaryArguments& a) {
    typedef typename Sum<T>::type S;
    using V = typename Lanes<S>::V;
    constexpr int64_t lanes = Lanes<S>::count;
    constexpr double radian = 0.15915494309189535, turn[] = {6.283185303211212, 3.9683743166540886e-09, 2.068073192717642e-18};
    const S* frequency = static_cast<const S*>(a.frequency);
    for (int64_t row = 0; row < a.rows; ++row) {
        const int64_t place = a.places ? a.places[row] : 0, block = place / a.page_size;
        const int64_t page = a.table ? a.table[row * a.table_row + block * a.table_block] : row;
        const T* from = static_cast<const T*>(a.x) + row * a.x_row;
        T* to = static_cast<T*>(a.y) + page * a.y_page + place % a.page_size * a.y_position;
        const size_t rest = static_cast<size_t>(a.width - 2 * a.half) * sizeof(T);
        for (int64_t h = 0; h < a.heads && rest; ++h)
            memcpy(to + h * a.y_head + 2 * a.half, from + h * a.width + 2 * a.half, rest);
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
                const T* x = from + h * a.width + c;
                T* y = to + h * a.y_head + c;
                const V first = read_some(x, left), second = read_some(x + a.half, left);
                write_some(y, first * cosine - second * sine, left);
                write_some(y + a.half, second * cosine + first * sine, left);
            }
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
