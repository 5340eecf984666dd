// Attention of a few queries over a long cache: flash decoding (Dao et al. 2023). The keys of each sequence are split;
// each part is gone through once, tile by tile, for all queries that share a head; parts are joined by their greatest
// logits and sums. Where the splits lie depends on a sequence's length alone, so that neither threads nor neighbours
// change a bit.
#include "decode_attention/cpu_tile.h"
#include "native/exports.h"
#include "native/parallel.h"

namespace ssmzoo {

// Strides count elements. A dense cache counts as one page a sequence: `block_table` is null then.
struct DecodeArguments {
    const void *q, *k, *v;                      // T: (s l h k), (pages page_size h_kv k), (pages page_size h_kv v)
    const int32_t *lengths, *block_table;       // (s), (s blocks)
    const void *slopes, *sinks;                 // S: (h), contiguous, or null
    void *out, *lse;                            // T: (s l h v); S: (s h l) or null; contiguous
    int64_t dtype, sequences, l, h, h_kv, k_size, v_size, page_size, left, splits, threads;
    int64_t q_sequence, q_position, q_head, lengths_step, table_sequence, table_block;
    int64_t k_page, k_position, k_head, k_step, v_page, v_position, v_head, v_step;
    double scale, softcap;
};

namespace SSMZOO_ISA {
namespace {

constexpr int64_t kSplit = 512;  // keys that one part has at least, where no number of parts is given

constexpr int64_t kRun = 4096;  // bytes: in runs as long as this memory is fast

// One of the two caches.
template <class T>
struct Cache {
    const T* data;
    int64_t page, position, head, step, size;
};

template <int n>
struct Number {
    static constexpr int value = n;
};

// The keys or values of one tile: where each position's first head lies, with its elements side by side.
template <class T>
struct TileRows {
    const T* at[kKeys];  // the last is repeated up to a multiple of 16, as that many keys are multiplied at once
    T* copies;           // (kKeys, heads, size), for a cache whose elements do not lie side by side
    int64_t head_step;
};

template <class T>
struct Kernel {
    typedef typename Sum<T>::type S;
    typedef typename Lanes<S>::V V;
    static constexpr int64_t lanes = Lanes<S>::count;

    const DecodeArguments& a;
    const int64_t group = a.h / a.h_kv, queries = a.l * group;  // that share a head of keys; query i * group + g
    // Of keys and values that one task takes together: those that lie beside each other within kRun bytes.
    const int64_t heads =
        a.k_head > a.k_position ? 1 : minimum(a.h_kv, ceil_div(kRun, a.k_size * int64_t(sizeof(T))));
    const int64_t head_groups = ceil_div(a.h_kv, heads);
    const int64_t k_row = round_up(a.k_size, lanes), v_row = round_up(a.v_size, lanes);
    const Cache<T> keys{static_cast<const T*>(a.k), a.k_page, a.k_position, a.k_head, a.k_step, a.k_size};
    const Cache<T> values{static_cast<const T*>(a.v), a.v_page, a.v_position, a.v_head, a.v_step, a.v_size};
    int64_t* firsts;        // (s + 1): number of each sequence's first part
    Softmax<S>* softmaxes;  // (parts h_kv queries)
    S* sums;                // (parts h_kv queries v_row)

    explicit Kernel(const DecodeArguments& arguments) : a(arguments) {}

    int64_t length(int64_t sequence) const { return a.lengths[sequence * a.lengths_step]; }

    // Before it lie keys that no query of the sequence sees.
    int64_t first_key(int64_t sequence) const {
        const int64_t first = length(sequence) - a.l - a.left;
        return a.left < 0 || first < 0 ? 0 : minimum(first, length(sequence));
    }

    // Parts of many queries are longer: else their sums would be as much to write as their keys to read.
    int64_t split(int64_t sequence) const {
        const int64_t seen = length(sequence) - first_key(sequence), fitting = round_up(8 * queries, kKeys);
        if (a.splits > 0) return ceil_div(seen, a.splits) + (seen == 0);
        return fitting > kSplit ? fitting : kSplit;
    }

    int64_t parts(int64_t sequence) const {
        return ceil_div(length(sequence) - first_key(sequence), split(sequence));
    }

    struct Space {
        S *q, *scores, *factors;
        T* copies;
        static size_t bytes(const Kernel& kernel) {
            const int64_t numbers = kernel.queries * (kernel.heads * kernel.k_row + kKeys + 1) + lanes;
            const bool copied = kernel.a.k_step != 1 || kernel.a.v_step != 1;
            const int64_t held = copied ? kKeys * kernel.heads * 2 * (kernel.a.k_size + kernel.a.v_size) : 0;
            return round_up(numbers * sizeof(S) + held * sizeof(T), 64);
        }
        Space(const Kernel& kernel, char* from)
            : q(reinterpret_cast<S*>(from)), scores(q + kernel.heads * kernel.queries * kernel.k_row),
              factors(scores + kernel.queries * kKeys),
              copies(reinterpret_cast<T*>(factors + round_up(kernel.queries, lanes))) {}
    };

    void find(const Cache<T>& cache, int64_t sequence, int64_t head, int64_t count_heads, int64_t first, int64_t count,
              TileRows<T>& rows) const {
        int64_t block = first / a.page_size, within = first % a.page_size;
        for (int64_t j = 0; j < count;) {
            const int64_t page = a.block_table ? a.block_table[sequence * a.table_sequence + block * a.table_block]
                                               : sequence;
            const T* row = cache.data + page * cache.page + within * cache.position + head * cache.head;
            const int64_t end = minimum(count, j + a.page_size - within);
            for (; j < end; ++j, row += cache.position) rows.at[j] = row;
            within = 0;
            ++block;
        }
        rows.head_step = cache.head;
        if (cache.step != 1) {
            rows.head_step = cache.size;
            for (int64_t j = 0; j < count; ++j) {
                T* copy = rows.copies + j * count_heads * cache.size;
                for (int64_t c = 0; c < count_heads; ++c)
                    for (int64_t i = 0; i < cache.size; ++i)
                        copy[c * cache.size + i] = rows.at[j][c * cache.head + i * cache.step];
                rows.at[j] = copy;
            }
        }
        for (int64_t j = count; j < round_up(count, 16); ++j) rows.at[j] = rows.at[count - 1];
    }

    void read_queries(int64_t sequence, int64_t head, S* q) const {
        for (int64_t r = 0; r < queries; ++r, q += k_row) {
            const T* from = at<T>(a.q, sequence * a.q_sequence + r / group * a.q_position +
                                           (head * group + r % group) * a.q_head);
            for (int64_t i = 0; i < a.k_size; i += lanes) store(q + i, read_some(from + i, a.k_size - i));
        }
    }

    Logits<S> logits(int64_t sequence, int64_t head, int64_t query, int64_t tile, int64_t count) const {
        const int64_t position = length(sequence) - a.l + query / group;  // may be negative: then it sees nothing
        const int64_t first = a.left < 0 ? 0 : position - a.left - tile, last = position + 1 - tile;
        const S slope = a.slopes ? *at<S>(a.slopes, head * group + query % group) : S(0);
        return {S(a.scale), S(a.softcap), slope, S(position - tile), S(first), S(minimum(last, count))};
    }

    template <int rows>
    void gather(const Space& space, S* own, int64_t query, const TileRows<T>& rows_of, int64_t at, int64_t count,
                Ahead<T>& ahead) const {
        constexpr int vectors = 4;
        own += query * v_row;
        const S *factors = space.factors + query, *weights = space.scores + query * kKeys;
        int64_t i = 0;
        for (; i + vectors * lanes <= a.v_size; i += vectors * lanes)
            add_values<T, rows, vectors>(own + i, v_row, factors, weights, rows_of.at, at + i, count, lanes, ahead);
        for (; i < a.v_size; i += lanes)
            add_values<T, rows, 1>(own + i, v_row, factors, weights, rows_of.at, at + i, count,
                                   minimum(a.v_size - i, lanes), ahead);
    }

    int64_t value_blocks() const { return a.v_size / (4 * lanes) + ceil_div(a.v_size % (4 * lanes), lanes); }

    // Calls call(query, number) for blocks of so many queries, as many at once as there are registers for.
    template <class Call>
    void in_blocks(const Call& call) const {
        int64_t query = 0;
        for (; query + kRows<S> <= queries; query += kRows<S>) call(query, Number<kRows<S>>());
        if (query + 2 <= queries) call(query, Number<2>()), query += 2;
        if (query < queries) call(query, Number<1>());
    }

    int64_t blocks() const {
        const int64_t rest = queries % kRows<S>;
        return queries / kRows<S> + rest / 2 + rest % 2;
    }

    // What of a cache's next tile to bring nearer with each key of so many passes over the present one.
    Ahead<T> ahead(const Cache<T>& cache, const TileRows<T>& rows, int64_t count, int64_t together, int64_t passes) const {
        const int64_t share = round_up(ceil_div(cache.size, passes), Ahead<T>::line);
        return {rows.at, cache.step == 1 ? count : 0, together, rows.head_step, cache.size, share};
    }

    // One part of one sequence's keys, for the queries of heads of keys that lie side by side.
    void part(int64_t task, char* scratch) const {
        const int64_t number = task / head_groups, head = task % head_groups * heads;
        const int64_t together = minimum(heads, a.h_kv - head);
        int64_t sequence = 0;
        for (int64_t end = a.sequences; end - sequence > 1;) {  // the last whose first part is not beyond this one
            const int64_t middle = (sequence + end) / 2;
            (firsts[middle] <= number ? sequence : end) = middle;
        }
        const Space space(*this, scratch);
        Softmax<S>* softmax = softmaxes + (number * a.h_kv + head) * queries;
        S* own = sums + (number * a.h_kv + head) * queries * v_row;
        memset(static_cast<void*>(space.q), 0, together * queries * k_row * sizeof(S));
        memset(static_cast<void*>(own), 0, together * queries * v_row * sizeof(S));
        for (int64_t r = 0; r < together * queries; ++r) softmax[r] = {kNothing<S>, S(0)};
        for (int64_t c = 0; c < together; ++c) read_queries(sequence, head + c, space.q + c * queries * k_row);

        const int64_t size = split(sequence), begin = first_key(sequence) + (number - firsts[sequence]) * size;
        const int64_t end = minimum(begin + size, length(sequence));
        TileRows<T> k_rows[2], v_rows[2];
        for (int i = 0; i < 2; ++i) {
            k_rows[i].copies = space.copies + i * kKeys * heads * (a.k_size + a.v_size);
            v_rows[i].copies = k_rows[i].copies + kKeys * heads * a.k_size;
        }
        find(keys, sequence, head, together, begin, minimum(kKeys, end - begin), k_rows[0]);
        find(values, sequence, head, together, begin, minimum(kKeys, end - begin), v_rows[0]);
        int now = 0;
        for (int64_t tile = begin; tile < end; tile += kKeys, now ^= 1) {
            const int64_t count = minimum(kKeys, end - tile), next = tile + count;
            const int64_t following = minimum(kKeys, end - next);
            if (following > 0) {
                find(keys, sequence, head, together, next, following, k_rows[now ^ 1]);
                find(values, sequence, head, together, next, following, v_rows[now ^ 1]);
            }
            Ahead<T> next_keys = ahead(keys, k_rows[now ^ 1], following, together, blocks());
            Ahead<T> next_values = ahead(values, v_rows[now ^ 1], following, together, blocks() * value_blocks());
            for (int64_t c = 0; c < together; ++c) {
                in_blocks([&](int64_t query, auto rows) {
                    products<T, decltype(rows)::value>(space.scores + query * kKeys,
                                                       space.q + (c * queries + query) * k_row, k_row, k_rows[now].at,
                                                       c * k_rows[now].head_step, count, a.k_size, next_keys);
                });
                for (int64_t r = 0; r < queries; ++r)
                    space.factors[r] = weigh(space.scores + r * kKeys, count,
                                             logits(sequence, head + c, r, tile, count), softmax[c * queries + r]);
                in_blocks([&](int64_t query, auto rows) {
                    gather<decltype(rows)::value>(space, own + c * queries * v_row, query, v_rows[now],
                                                  c * v_rows[now].head_step, count, next_values);
                });
            }
        }
    }

    // The parts of one sequence and head, in their order, and the sink → out and lse.
    void join(int64_t task) const {
        const int64_t sequence = task / a.h, head = task % a.h;
        const int64_t begin = firsts[sequence], end = firsts[sequence + 1];
        const S sink = a.sinks ? *at<S>(a.sinks, head) : kNothing<S>;
        for (int64_t i = 0; i < a.l; ++i) {
            const int64_t query = i * group + head % group, step = a.h_kv * queries;
            const Softmax<S>* softmax = softmaxes + head / group * queries + query;
            S *own = sums + (begin * step + head / group * queries + query) * v_row, top = sink;
            for (int64_t p = begin; p < end; ++p) top = softmax[p * step].top > top ? softmax[p * step].top : top;
            const S base = top == kNothing<S> ? S(0) : top;
            S total = a.sinks ? power(sink - base) : S(0);
            for (int64_t p = begin; p < end; ++p) {
                const S factor = power(softmax[p * step].top - base);
                const S* other = own + (p - begin) * step * v_row;
                total += factor * softmax[p * step].total;
                for (int64_t j = 0; j < v_row; j += lanes)
                    store(own + j, fma(splat(factor), load(other + j), p == begin ? V{} : load(own + j)));
            }
            const S inverse = total == S(0) ? S(0) : S(1) / total;
            T* out = static_cast<T*>(a.out) + ((sequence * a.l + i) * a.h + head) * a.v_size;
            for (int64_t j = 0; j < a.v_size; j += lanes)
                write_some(out + j, begin == end ? V{} : load(own + j) * splat(inverse), a.v_size - j);
            if (a.lse)
                static_cast<S*>(a.lse)[(sequence * a.h + head) * a.l + i] =
                    total == S(0) ? kNothing<S> : S(double(base) + __builtin_log(double(total)));
        }
    }

    static S power(S x) { return exp<S>(splat<S>(x))[0]; }
};

template <class T>
int decode_attention(const DecodeArguments& a) {
    typedef Kernel<T> K;
    typedef typename K::S S;
    if (a.sequences * a.l * a.h == 0) return 0;
    Scratch firsts((a.sequences + 1) * sizeof(int64_t));
    if (!firsts.data) return kOutOfMemory;
    K kernel{a};
    kernel.firsts = reinterpret_cast<int64_t*>(firsts.data);
    kernel.firsts[0] = 0;
    for (int64_t i = 0; i < a.sequences; ++i) kernel.firsts[i + 1] = kernel.firsts[i] + kernel.parts(i);
    const int64_t parts = kernel.firsts[a.sequences], tasks = parts * kernel.head_groups;
    const int64_t rows = parts * a.h_kv * kernel.queries;
    const int64_t threads = minimum(a.threads, tasks > 1 ? tasks : 1), each = K::Space::bytes(kernel);
    Scratch softmaxes(rows * sizeof(Softmax<S>)), sums(rows * kernel.v_row * sizeof(S)), scratch(threads * each);
    if (!softmaxes.data || !sums.data || !scratch.data) return kOutOfMemory;
    kernel.softmaxes = reinterpret_cast<Softmax<S>*>(softmaxes.data);
    kernel.sums = reinterpret_cast<S*>(sums.data);
    parallel_stage(tasks, threads, [&](int64_t task, int thread) { kernel.part(task, scratch.data + thread * each); });
    parallel_stage(a.sequences * a.h, threads, [&](int64_t task, int) { kernel.join(task); });
    return 0;
}

}  // namespace
}  // namespace SSMZOO_ISA
}  // namespace ssmzoo

SSMZOO_EXPORT_DTYPES(decode_attention, DecodeArguments, dtype, decode_attention)
