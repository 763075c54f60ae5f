/* Decodes files that come on standard input, each behind its size (u32, little-endian), in memory of their exact sizes,
 * and writes a line for each: the CRC-32 of all its tensors, one after another, or "refused". */
#include "digest.h"

#include <stdio.h>

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
