// Reads memory and does next to nothing with it: the least time of whatever has to read as much.
#include "exports.h"
#include "parallel.h"
#include "tiles.h"

namespace ssmzoo {

struct ReadArguments {
    const void* from;
    void* sums;  // int64_t: one for each part, a contiguous run of bytes
    int64_t bytes, parts, threads;
};

namespace SSMZOO_ISA {
namespace {

typedef Lanes<double>::I Words;

int64_t sum_of_words(const char* from, int64_t bytes) {
    constexpr int64_t each = sizeof(Words), together = 4;
    Words sums[together] = {};
    int64_t at = 0;
    for (; at + together * each <= bytes; at += together * each)
        for (int64_t i = 0; i < together; ++i) {
            Words words;
            memcpy(&words, from + at + i * each, each);
            sums[i] += words;
        }
    const Words all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    int64_t sum = 0;
    for (int64_t i = 0; i < each / 8; ++i) sum += all[i];
    for (; at < bytes; ++at) sum += static_cast<uint8_t>(from[at]);
    return sum;
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT(read)(const ssmzoo::ReadArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    const int64_t each = ceil_div(a->bytes, a->parts);
    parallel_stage(a->parts, a->threads, [&](int64_t i, int) {
        const int64_t first = minimum(i * each, a->bytes), last = minimum(first + each, a->bytes);
        static_cast<int64_t*>(a->sums)[i] = sum_of_words(static_cast<const char*>(a->from) + first, last - first);
    });
    return 0;
}
