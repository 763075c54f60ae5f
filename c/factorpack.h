/* A decoder of Factorpack files, version 0.1, in C99. It allocates nothing, changes no globals and can be re-entered:
 * all memory is the caller's. It reads the file from memory (a buffer, flash, a mapped file) and never writes to it.
 *
 *     if (fpk_open_need(data, size, &need)) ...                      // how much memory fpk_open asks for
 *     if (fpk_open(&file, data, size, index_memory, need)) ...       // it stays in use as long as the file
 *     for (uint32_t i = 0; i < fpk_count(&file); i++) {
 *         fpk_info(&file, i, &tensor);                               // name, dtype, shape
 *         if (fpk_need(&file, i, &bytes, &scratch)) ...              // refuse here what is too large for you
 *         if (fpk_decode(&file, i, out, bytes, work, scratch)) ...   // out holds the tensor; work is free again
 *     }
 *
 * - Functions return FPK_OK (0) or an error; after an error, what they were to write has no meaning.
 * - All sizes are bytes. Memory needs no alignment: what aligning takes is part of the needs that functions tell.
 * - Work memory is used as arrays of other types: take it from an allocator, or leave it to this library alone.
 * - `data`, the memory of fpk_open and the fpk_file must not move or change while the file is used. Several threads
 *   may then decode from it at once, each with out and work of its own. There is nothing to close.
 * - fpk_open checks the checksum of the index, fpk_need and fpk_decode that of the record which holds the tensor: a
 *   file is known to be whole once all its tensors were decoded.
 * - `double` must be IEEE 754 binary64, evaluated as such (no x87, no -ffast-math) and rounded to nearest. */
#ifndef FACTORPACK_H
#define FACTORPACK_H

#include <stddef.h>
#include <stdint.h>

typedef enum { /* fpk_error_text() says what each is */
    FPK_OK = 0, FPK_ERROR_ARGUMENT, FPK_ERROR_MEMORY, FPK_ERROR_SHELL, FPK_ERROR_VERSION, FPK_ERROR_TRUNCATED,
    FPK_ERROR_TRAILING, FPK_ERROR_CHECKSUM, FPK_ERROR_VARINT, FPK_ERROR_DEFLATE, FPK_ERROR_INDEX, FPK_ERROR_STREAM,
    FPK_ERROR_MODEL, FPK_ERROR_RANS, FPK_ERROR_ESCAPES, FPK_ERROR_WEIGHT, FPK_ERROR_VECTOR
} fpk_error;
typedef enum { FPK_WEIGHT = 0, FPK_VECTOR, FPK_EXACT, FPK_ALIAS } fpk_kind;
typedef enum { /* what fpk_decode writes: the tensor's in the model. Complex: the real part, then the imaginary */
    FPK_FLOAT32 = 0, FPK_FLOAT16, FPK_BFLOAT16, FPK_FLOAT64, FPK_INT64, FPK_INT32, FPK_INT16, FPK_INT8,
    FPK_UINT8, FPK_BOOL, FPK_COMPLEX64, FPK_COMPLEX128, FPK_UINT16, FPK_UINT32, FPK_UINT64
} fpk_dtype;

#define FPK_MAX_AXES 16
typedef struct {
    const char *name;             /* UTF-8, name_size bytes, NOT ended by a zero; lies in the memory of fpk_open */
    uint32_t name_size;
    fpk_kind kind;
    fpk_dtype dtype;
    uint32_t axes;                /* 0 for a scalar */
    uint32_t shape[FPK_MAX_AXES]; /* entries along each of the axes; the last axis is contiguous */
    uint64_t entries;             /* the product of the shape, 2^32 at most */
    uint32_t target;              /* the number of the tensor that an alias is tied to; else its own */
} fpk_tensor;

typedef struct { /* an open file; the fields are not for use outside */
    const uint8_t *blob, *index;
    struct fpk_entry *entries;
    uint32_t tensors, aliases, vectors;
    uint64_t vector_entries, exact_bytes;
} fpk_file;

/* How much memory fpk_open needs. Inflates only the two counts at the start of the index. The answer is at most some
 * 16 times what the index claims to have (2^28 bytes at most): compare it with what you are willing to spend.
 * Errors: ARGUMENT, MEMORY, SHELL, VERSION, TRUNCATED, CHECKSUM, VARINT, DEFLATE, INDEX. */
fpk_error fpk_open_need(const void *data, size_t size, size_t *work_size);

/* Reads and checks the index of the file of `size` bytes at `data`. `work` is kept with the file.
 * Errors: as fpk_open_need, TRAILING; MEMORY where work_size is less than that told. */
fpk_error fpk_open(fpk_file *file, const void *data, size_t size, void *work, size_t work_size);

/* The number of names: stored tensors, then aliases. They are numbered from 0 in all that follows. */
uint32_t fpk_count(const fpk_file *file);
/* What the index tells of tensor i. Errors: ARGUMENT. */
fpk_error fpk_info(const fpk_file *file, uint32_t i, fpk_tensor *tensor);

/* How many bytes tensor i takes in the output and how many of work memory fpk_decode needs for it. Walks through the
 * tensor's record without decoding integers: it needs no memory, and finds many errors. Work memory is 4 bytes for
 * each integer of basis and codes, each step and each class, or each entry of all vectors of the file, and that of
 * the models of one stream (8 KiB each, 16 of them at most); 32 KiB for exact tensors.
 * Errors: ARGUMENT; MEMORY where a size_t cannot hold the answer; all from TRUNCATED to VECTOR but INDEX. */
fpk_error fpk_need(const fpk_file *file, uint32_t i, size_t *out_size, size_t *work_size);

/* Decodes tensor i into `out`: its entries row by row, in its own dtype and the byte order of the host (bool: 0 or 1).
 * `work` is free again after the call and must not overlap `out`; both may be larger than needed. Vectors share one
 * record, and so do exact tensors: each call decodes all of it and keeps what was asked for. Takes 5 KiB of stack.
 * Errors: as fpk_need; MEMORY where out_size or work_size is less than that told. */
fpk_error fpk_decode(const fpk_file *file, uint32_t i, void *out, size_t out_size, void *work, size_t work_size);

/* A short English text for an error; never null. */
const char *fpk_error_text(fpk_error error);

#endif
