/* Streams and models from standard input through rans.c, each in buffers of exactly its size; prints what came of each.

   A stream is seven 32-bit numbers (lanes, words, tables, their entries, symbols, whether there are contexts, 0), then
   states, words, starts, offsets, firsts and contexts. A model is seven of which the last is its symbols, then their
   exponents and the 65 entries of the octave. */

#include <stdio.h>
#include <stdlib.h>

#include "rans.c"

static void *taken(size_t count, size_t size)
{
    void *data = malloc(count > 0 ? count * size : 1);
    if (!data || (count && fread(data, size, count, stdin) != count))
        exit(2);
    return data;
}

static int model(size_t count)
{
    int64_t *exponents = taken(count, sizeof *exponents), *octave = taken(65, sizeof *octave);
    int32_t *frequencies = malloc(count > 0 ? count * sizeof *frequencies : 1);
    uint32_t sum = 2166136261u;
    size_t at;
    int told;
    if (!frequencies)
        return 2;
    told = factorpack_frequencies_1(exponents, count, octave, frequencies);
    for (at = 0; told == 0 && at < count; at++)
        sum = (sum ^ (uint32_t)frequencies[at]) * 16777619u;
    printf("%d %lu %lu\n", told, (unsigned long)count, (unsigned long)sum);
    free(exponents), free(octave), free(frequencies);
    return 0;
}

int main(void)
{
    uint32_t head[7];
    while (fread(head, sizeof *head, 7, stdin) == 7) {
        if (head[6]) {
            if (model(head[6]))
                return 2;
            continue;
        }
        const size_t lanes = head[0], words = head[1], tables = head[2], entries = head[3], count = head[4];
        uint32_t *state = taken(lanes, sizeof *state), sum = 2166136261u;
        uint16_t *word = taken(words, sizeof *word), *start = taken(entries, sizeof *start);
        int64_t *offset = taken(tables, sizeof *offset);
        int32_t *first = taken(tables, sizeof *first);
        uint8_t *context = head[5] ? taken(count, sizeof *context) : NULL;
        int32_t *symbols = malloc(count > 0 ? count * sizeof *symbols : 1);
        size_t decoded, at;
        int told;
        if (!symbols)
            return 2;
        told = factorpack_decode_1(state, lanes, word, words, context, start, offset, first, tables, symbols, count,
                                   &decoded);
        for (at = 0; at < decoded; at++)
            sum = (sum ^ (uint32_t)symbols[at]) * 16777619u;
        printf("%d %lu %lu\n", told, (unsigned long)decoded, (unsigned long)sum);
        free(state), free(word), free(start), free(offset), free(first), free(context), free(symbols);
    }
    return 0;
}
