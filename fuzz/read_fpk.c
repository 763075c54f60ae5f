/* Files to the decoder in C, chosen by what of its code they reach: a target for libFuzzer, which fuzz/run.py builds
 * and runs. An input is a byte and then, where that is
 *   0  a file as it is
 *   1  parts, each behind its size (u16, little-endian): the index up to the sizes of the records, the records, the
 *      names. They become a file whose sizes and checksums are right, so that what lies behind these is reached */
#include "digest.h"

#include <stdio.h>
#include <string.h>

#define MOST ((size_t)1 << 22) /* bytes of each piece of memory that the decoder may ask for */
#define MOST_PARTS 256

typedef struct { const uint8_t *at; size_t size; } part;

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned int seed);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static size_t split(const uint8_t *data, size_t size, part *parts) { /* of a size that goes too far, what there is */
    size_t count = 0;
    for (const uint8_t *end = data + size; count < MOST_PARTS && end - data >= 2; data += parts[count++].size) {
        size_t claimed = data[0] | (size_t)data[1] << 8;
        data += 2;
        parts[count].at = data, parts[count].size = claimed < (size_t)(end - data) ? claimed : (size_t)(end - data);
    }
    return count;
}

static uint8_t *put(uint8_t *to, const void *from, size_t size) { return (uint8_t *)memcpy(to, from, size) + size; }
static uint8_t *put_u32(uint8_t *to, size_t value) {
    for (int shift = 0; shift < 32; shift += 8) *to++ = (uint8_t)(value >> shift);
    return to;
}

/* The index is deflated as one block that is stored, of 65,535 bytes at most: NULL where it would be longer. */
static uint8_t *joined(const part *parts, size_t count, size_t *size) {
    uint8_t index[65535], *end = index, *out, *to;
    const part *front = parts, *names = parts + count - 1;
    size_t records = 0;
    if (count < 2 || front->size + names->size + 3 * count > sizeof index) return NULL;
    end = put(end, front->at, front->size);
    for (const part *r = front + 1; r < names; records += r++->size + 4) {
        size_t n = r->size;
        for (; n > 127; n >>= 7) *end++ = (uint8_t)(n | 128);
        *end++ = (uint8_t)n;
    }
    end = put(end, names->at, names->size);
    size_t n = (size_t)(end - index), blob = 12 + 5 + n + records;
    char header[256];
    int length = snprintf(header, sizeof header, "{\"__metadata__\":{\"factorpack\":\"0.1\"},\"factorpack\":{\"dtype\":"
                          "\"U8\",\"shape\":[%lu],\"data_offsets\":[0,%lu]}}", (unsigned long)blob, (unsigned long)blob);
    *size = 8 + (size_t)length + blob;
    if (!(out = malloc(*size))) abort();
    to = put(put_u32(put_u32(out, (size_t)length), 0), header, (size_t)length);
    uint8_t *checksum = put_u32(put_u32(to, n + 5), n) , *stored = checksum + 4;
    const uint8_t block[5] = {1, (uint8_t)n, (uint8_t)(n >> 8), (uint8_t)~n, (uint8_t)(~n >> 8)};
    to = put(put(stored, block, 5), index, n);
    put_u32(checksum, crc32(0, stored, n + 5));
    for (const part *r = front + 1; r < names; r++) to = put_u32(put(to, r->at, r->size), crc32(0, r->at, r->size));
    return out;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    uint32_t crc;
    if (size > 0 && data[0] == 0) {
        (void)digest(data + 1, size - 1, MOST, &crc);
    } else if (size > 0 && data[0] == 1) {
        part parts[MOST_PARTS];
        uint8_t *file = joined(parts, split(data + 1, size - 1, parts), &size);
        if (file) (void)digest(file, size, MOST, &crc);
        free(file);
    }
    return 0;
}

/* Changes one part, whose size it corrects, or a whole file; never what an input is. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned int seed) {
    part parts[MOST_PARTS];
    size_t count = size > 0 && data[0] == 1 ? split(data + 1, size - 1, parts) : 0;
    if (size == 0) data[size++] = 0;
    if (count == 0) return 1 + LLVMFuzzerMutate(data + 1, size - 1, most - 1);
    static uint8_t changed[65535];
    const part *old = parts + seed % count;
    size_t room = most - size + old->size;
    uint8_t *to = data + (old->at - data), *end = data + size;
    memcpy(changed, to, old->size);
    size_t n = LLVMFuzzerMutate(changed, old->size, room < sizeof changed ? room : sizeof changed);
    memmove(to + n, to + old->size, (size_t)(end - to) - old->size);
    memcpy(to, changed, n);
    to[-2] = (uint8_t)n, to[-1] = (uint8_t)(n >> 8);
    return size - old->size + n;
}
