/* Decodes a Factorpack file and writes each tensor: fpk_dump FILE DIRECTORY makes DIRECTORY/0.bin, 1.bin, ... and a
 * line a tensor: number, dtype, kind, target, axes and shape, bytes, work bytes, name. */
#include "factorpack.h"

#include <stdio.h>
#include <stdlib.h>

#define LIMIT ((size_t)1 << 30) /* bytes for a tensor, and of work memory, that this program is willing to spend */

static const char *const DTYPES[] = {"float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8",
                                     "uint8", "bool", "complex64", "complex128", "uint16", "uint32", "uint64"};

static int complain(const char *what, fpk_error error)
{
    fprintf(stderr, "%s: %s\n", what, fpk_error_text(error));
    return 1;
}

int main(int argc, char **argv)
{
    fpk_file file;
    fpk_error error;
    FILE *in;
    long size;
    size_t need, bytes, scratch;
    void *data, *index;
    uint32_t i, a;
    if (argc != 3 || !(in = fopen(argv[1], "rb"))) return fprintf(stderr, "fpk_dump FILE DIRECTORY\n"), 2;
    fseek(in, 0, SEEK_END);
    size = ftell(in);
    rewind(in);
    data = malloc((size_t)size + 1);
    if (!data || fread(data, 1, (size_t)size, in) != (size_t)size) return fprintf(stderr, "cannot read\n"), 2;
    fclose(in);
    error = fpk_open_need(data, (size_t)size, &need);
    if (error) return complain(argv[1], error);
    if (need > LIMIT) return fprintf(stderr, "%s: beyond the limit of memory\n", argv[1]), 1;
    index = malloc(need);
    if (!index) return fprintf(stderr, "no memory\n"), 2;
    error = fpk_open(&file, data, (size_t)size, index, need);
    if (error) return complain(argv[1], error);
    printf("index %lu\n", (unsigned long)need);
    for (i = 0; i < fpk_count(&file); i++) {
        fpk_tensor t;
        void *out, *work;
        char path[4096];
        FILE *to;
        fpk_info(&file, i, &t);
        error = fpk_need(&file, i, &bytes, &scratch);
        if (error) return complain("fpk_need", error);
        if (bytes > LIMIT || scratch > LIMIT) return fprintf(stderr, "%s: beyond the limit of memory\n", argv[1]), 1;
        out = malloc(bytes + 1);
        work = malloc(scratch);
        if (!out || !work) return fprintf(stderr, "no memory\n"), 2;
        error = fpk_decode(&file, i, out, bytes, work, scratch);
        if (error) return complain("fpk_decode", error);
        printf("%u %s %d %u %u", (unsigned)i, DTYPES[t.dtype], (int)t.kind, (unsigned)t.target, (unsigned)t.axes);
        for (a = 0; a < t.axes; a++) printf(" %u", (unsigned)t.shape[a]);
        printf(" %lu %lu %.*s\n", (unsigned long)bytes, (unsigned long)scratch, (int)t.name_size, t.name);
        snprintf(path, sizeof path, "%s/%u.bin", argv[2], (unsigned)i);
        to = fopen(path, "wb");
        if (!to || fwrite(out, 1, bytes, to) != bytes) return fprintf(stderr, "cannot write\n"), 2;
        fclose(to);
        free(out);
        free(work);
    }
    free(index);
    free(data);
    return 0;
}
