/* What the decoder makes of a file, in memory of exact sizes: for programs that try files, many of them damaged. */
#include "factorpack.h"

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

/* Whether the file is read, and the CRC-32 of all its tensors, one after another. The caller's limit for each piece of
 * memory is `most`. Ends the program where the decoder contradicts itself. */
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
