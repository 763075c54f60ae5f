/* Decodes files that come on standard input, each behind its size (u32, little-endian), in memory of their exact sizes,
 * and writes a line for each: the CRC-32 of all its tensors, one after another, or "refused". */
#include "factorpack.h"

#include <stdio.h>
#include <stdlib.h>

static uint32_t crc32(uint32_t crc, const uint8_t *p, size_t size) {
    for (crc = ~crc; size > 0; size--) {
        crc ^= *p++;
        for (int bit = 0; bit < 8; bit++) crc = (0xedb88320u & (0u - (crc & 1))) ^ crc >> 1;
    }
    return ~crc;
}

static void *memory(size_t size, size_t most) { /* never without a byte of its own, so that its end is guarded */
    return size > most ? NULL : malloc(size ? size : 1);
}

/* The caller's limit for each piece of memory is `most`. Ends the program where the decoder contradicts itself. */
static int digest(const uint8_t *data, size_t size, size_t most, uint32_t *crc) {
    fpk_file file;
    size_t need, bytes, scratch;
    int good = 0;
    if (fpk_open_need(data, size, &need)) return 0;
    void *index = memory(need, most);
    if (index && !fpk_open(&file, data, size, index, need)) {
        good = 1, *crc = 0;
        for (uint32_t i = 0; good && i < fpk_count(&file); i++) {
            good = !fpk_need(&file, i, &bytes, &scratch);
            uint8_t *out = good ? memory(bytes, most) : NULL, *work = good ? memory(scratch, most) : NULL;
            good = out && work;
            if (good) {
                fpk_error error = fpk_decode(&file, i, out, bytes, work, scratch);
                if (error == FPK_ERROR_MEMORY || error == FPK_ERROR_ARGUMENT) abort(); /* fpk_need was wrong */
                good = !error;
                if (good) *crc = crc32(*crc, out, bytes);
            }
            free(out), free(work);
        }
    }
    free(index);
    return good;
}

int main(int argc, char **argv) {
    size_t most = argc == 2 ? (size_t)strtoul(argv[1], NULL, 10) : 0;
    uint8_t head[4];
    while (fread(head, 1, 4, stdin) == 4) {
        size_t size = head[0] | (size_t)head[1] << 8 | (size_t)head[2] << 16 | (size_t)head[3] << 24;
        uint8_t *data = memory(size, most);
        uint32_t crc;
        if (!data || fread(data, 1, size, stdin) != size) return 2;
        if (digest(data, size, most, &crc)) printf("%08lx\n", (unsigned long)crc);
        else printf("refused\n");
        free(data);
    }
    return 0;
}
