/* The decoder that coding/reference.py defines, and the frequencies of coding/models.py, as machine code;
   coding/compiled.py calls both.

   C99 without a library. Tables are checked before the decoder is called: each sums to 2^14, contexts are below their
   number. */

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
/* An exponent has 14 bits below the binary point, of which the upper six choose an entry of `octave`. */
enum { OCTAVE_BITS = 14, ENTRY_BITS = 6, REST_BITS = OCTAVE_BITS - ENTRY_BITS, FRACTION_BITS = 30 };
enum { NO_SYMBOL = 1, TOO_MANY_SYMBOLS = 2 };

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

/* Frequencies that sum to 2^14 of symbols with weights 2^(exponent / 2^14), at most 2^38; of none where that is negative.
   `octave` are 65 entries. `exponents` are used up. */
EXPORTED int factorpack_frequencies_1(int64_t *exponents, size_t count, const int64_t *octave, int32_t *frequencies)
{
    int64_t total = 0, missing = 1 << PRECISION;
    size_t index, largest = 0;

    for (index = 0; index < count; index++) {
        const int64_t exponent = exponents[index];
        int64_t weight = 0;
        if (exponent >= 0) {
            const int64_t *entry = octave + (exponent >> REST_BITS & ((1 << ENTRY_BITS) - 1));
            const int64_t rest = exponent & ((1 << REST_BITS) - 1);
            weight = entry[0] * ((1 << REST_BITS) - rest) + entry[1] * rest;
            weight >>= FRACTION_BITS + REST_BITS - (exponent >> OCTAVE_BITS);
        }
        exponents[index] = weight;
        total += weight;
    }
    if (total == 0)
        return NO_SYMBOL;
    for (index = 0; index < count; index++) {
        int64_t frequency = (exponents[index] << PRECISION) / total;
        if (frequency == 0)
            frequency = exponents[index] > 0;
        frequencies[index] = (int32_t)frequency;
        missing -= frequency;
        if (frequency > frequencies[largest])
            largest = index;
    }
    frequencies[largest] += (int32_t)missing;
    return frequencies[largest] < 1 ? TOO_MANY_SYMBOLS : GOOD;
}
