/* The decoder that coding/reference.py defines, as machine code; coding/compiled.py calls it.

   C99 without a library. Tables are checked before it is called: each sums to 2^14, contexts are below their number. */

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

enum { PRECISION = 14, SLOTS = 1 << PRECISION, LOWER = 1 << 16, MOST_CONTEXTS = 16 };
/* A symbol is looked for from the one that holds the first slot of sixteen. */
enum { BUCKET_BITS = 4, BUCKETS = SLOTS >> BUCKET_BITS };
enum { GOOD = 0, WORDS_END = 1, WORDS_LEFT = 2, TOO_MANY_CONTEXTS = 3 };

/* `starts` are, table after table, the sums of the frequencies before each symbol, and 2^14; `offsets` where a table's
   begin, `firsts` its first symbol. `contexts` may be null: table 0 for all. `states` are used up. `decoded` is how many
   symbols were. */
EXPORTED int factorpack_decode_1(uint32_t *states, size_t lanes, const uint16_t *words, size_t word_count,
                                 const uint8_t *contexts, const uint16_t *starts, const int64_t *offsets,
                                 const int32_t *firsts, size_t tables, int32_t *symbols, size_t count, size_t *decoded)
{
    uint16_t buckets[MOST_CONTEXTS][BUCKETS];
    size_t taken = 0, lane = 0, index, table, bucket;

    *decoded = 0;
    if (tables > MOST_CONTEXTS)
        return TOO_MANY_CONTEXTS;
    for (table = 0; table < tables; table++) {
        const uint16_t *start = starts + offsets[table];
        uint16_t symbol = 0;
        for (bucket = 0; bucket < BUCKETS; bucket++) {
            while (start[symbol + 1] <= bucket << BUCKET_BITS)
                symbol++;
            buckets[table][bucket] = symbol;
        }
    }
    for (index = 0; index < count; index++) {
        const size_t context = contexts ? contexts[index] : 0;
        const uint16_t *start = starts + offsets[context];
        uint32_t state = states[lane];
        const uint32_t slot = state & (SLOTS - 1);
        uint32_t symbol = buckets[context][slot >> BUCKET_BITS];
        while (start[symbol + 1] <= slot)
            symbol++;
        state = (uint32_t)(start[symbol + 1] - start[symbol]) * (state >> PRECISION) + slot - start[symbol];
        if (state < LOWER) {
            if (taken == word_count) {
                *decoded = index;
                return WORDS_END;
            }
            state = state << 16 | words[taken++];
        }
        states[lane] = state;
        symbols[index] = firsts[context] + (int32_t)symbol;
        if (++lane == lanes)
            lane = 0;
    }
    *decoded = count;
    if (taken != word_count)
        return WORDS_LEFT;
    for (lane = 0; lane < lanes; lane++)
        if (states[lane] != LOWER)
            return WORDS_LEFT;
    return GOOD;
}
