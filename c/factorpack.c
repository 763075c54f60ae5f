/* A decoder of Factorpack files. "Section n" is that of docs/format.md, whose terms and letters are used throughout. */
#include "factorpack.h"

#include <string.h>

#define LIMIT_ENTRIES ((uint64_t)1 << 32)
#define LIMIT_INTEGER ((int64_t)1 << 24)
#define ESCAPED INT32_MIN /* stands for an escaped integer until it is read; + q once its prefix is known */

enum { LIMIT_EXPONENT = 7680, LIMIT_LOGARITHM = 64000, WINDOW = 32768, BLOCK = 64 };
enum { TOTAL_BITS = 14, LOW_STATE = 65536 }; /* the frequencies of a model sum to 2^14; states are at least 2^16 */

typedef char double_is_binary64[sizeof(double) == 8 && sizeof(float) == 4 ? 1 : -1];

struct fpk_entry {
    uint64_t entries, record;                           /* record: where in the blob it starts */
    uint32_t record_size, shape_at, name_at, name_size; /* the places are in the index */
    uint32_t target;
    uint8_t kind, dtype, axes;
};

/* Bytes of an entry in the output, and of one among the exact tensors (section 3). */
static const uint8_t DTYPE_OUT[15] = {4, 2, 2, 8, 8, 4, 2, 1, 1, 1, 8, 16, 2, 4, 8};
static const uint8_t DTYPE_STORED[15] = {4, 2, 4, 8, 8, 4, 2, 1, 1, 1, 8, 16, 2, 4, 8};

/* ---- Reading, and the caller's memory ---- */
/* What is being read, the work memory, and the first error, which sticks: after it all readers give 0 or NULL. While
 * `measuring` nothing is decoded: the same code walks through a record with the same calls of take(), which give NULL,
 * so that `peak` becomes what decoding will need. */
typedef struct {
    const uint8_t *at, *end;
    uint8_t *memory;
    uint64_t memory_size, used, peak;
    int measuring;
    fpk_error error;
} decoder;

/* Notes an error where there is cause; returns whether there has been one by now. */
static int refuse(decoder *d, int cause, fpk_error error) {
    if (cause && !d->error) d->error = error;
    return d->error != FPK_OK;
}

static void *take(decoder *d, uint64_t count, uint32_t each) {
    uint64_t start = d->used; /* a multiple of 8; counts are at most 2^33, so that nothing overflows */
    d->used += (count * each + 7) & ~(uint64_t)7;
    if (d->used > d->peak) d->peak = d->used;
    if (d->measuring || refuse(d, d->used > d->memory_size, FPK_ERROR_MEMORY)) return NULL;
    return d->memory + start;
}

static const uint8_t *read_bytes(decoder *d, uint64_t size) {
    if (refuse(d, size > (uint64_t)(d->end - d->at), FPK_ERROR_TRUNCATED)) return NULL;
    d->at += size;
    return d->at - size;
}
static uint32_t read_byte(decoder *d) {
    const uint8_t *p = read_bytes(d, 1);
    return p ? *p : 0;
}

static uint32_t read_varint(decoder *d) { /* section 1 */
    for (uint32_t value = 0, shift = 0;; shift += 7) {
        uint32_t byte = read_byte(d);
        /* Refused: beyond 32 bits or a sixth byte, and a last byte of zero. */
        if (refuse(d, (shift == 28 && byte > 15) || (shift > 0 && byte == 0), FPK_ERROR_VARINT)) return 0;
        value |= (byte & 127) << shift;
        if (byte < 128) return value;
    }
}

static int64_t read_zigzag(decoder *d) {
    uint32_t u = read_varint(d);
    return u & 1 ? -(int64_t)(u >> 1) - 1 : (int64_t)(u >> 1);
}
static int beyond(int64_t value, int64_t limit) { return value > limit || value < -limit; }
static uint32_t get_u16(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }
static uint32_t get_u32(const uint8_t *p) { return get_u16(p) | get_u16(p + 2) << 16; }

/* Bits, the highest of a byte first; n is at most 31. */
static uint32_t get_bits(const uint8_t *p, uint64_t *at, uint32_t n) {
    uint32_t value = 0;
    for (; n > 0; n--, ++*at) value = value << 1 | (p[*at / 8] >> (7 - *at % 8) & 1);
    return value;
}

static void check_crc32(decoder *d, const uint8_t *p, uint64_t size, const uint8_t *expected) {
    uint32_t crc = 0xffffffffu;
    for (; size > 0; size--) {
        crc ^= *p++;
        for (int bit = 0; bit < 8; bit++) crc = (0xedb88320u & (0u - (crc & 1))) ^ crc >> 1;
    }
    refuse(d, ~crc != get_u32(expected), FPK_ERROR_CHECKSUM);
}

static int is_utf8(const uint8_t *p, uint64_t size) {
    static const uint32_t least[4] = {0, 0x80, 0x800, 0x10000};
    for (; size > 0; size--) {
        uint32_t c = *p++, more = c < 0xc0 ? 0 : c < 0xe0 ? 1 : c < 0xf0 ? 2 : 3;
        if ((c >= 0x80 && c < 0xc0) || c >= 0xf8 || size <= more) return 0;
        if (more > 0) c &= 0x3fu >> more;
        for (uint32_t left = more; left > 0; left--, size--, c = c << 6 | (*p++ & 0x3f))
            if ((*p & 0xc0) != 0x80) return 0;
        if (c < least[more] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) return 0;
    }
    return 1;
}

/* ---- Inflate: RFC 1951 ---- */
typedef struct {
    const uint8_t *at, *end;
    uint32_t hold, held;           /* bits that were read and not yet used, the first one lowest; how many */
    uint8_t *window;
    uint64_t mask, written, total; /* mask: the window's size less 1; all ones where the window is the output */
    int failed;
    uint8_t *out;                  /* the values of an exact tensor, which are ... */
    uint64_t from, to;             /* ... these bytes of what is inflated */
    uint32_t dtype, flip;          /* flip: to be XORed to a byte's place where the host has the highest byte first */
} inflater;

typedef struct { uint16_t count[16], symbol[288]; } huffman; /* codes of each length; symbols in order of the codes */

static void put(inflater *z, uint8_t byte) {
    uint64_t place = z->written - z->from;
    z->failed |= z->written == z->total;
    if (z->failed) return;
    z->window[z->written & z->mask] = byte;
    if (z->written >= z->from && z->written < z->to) { /* section 9 */
        z->failed = (z->dtype == FPK_BOOL && byte > 1) || (z->dtype == FPK_BFLOAT16 && !(place & 2) && byte > 0);
        if (z->dtype != FPK_BFLOAT16) z->out[place ^ z->flip] = byte;
        else if (place & 2) z->out[(place / 4 * 2 + (place & 1)) ^ z->flip] = byte; /* the upper half of a float32 */
    }
    z->written++;
}

static uint32_t next_bits(inflater *z, uint32_t n) {
    for (; z->held < n; z->held += 8) {
        if (z->at == z->end) z->failed = 1;
        if (z->failed) return 0;
        z->hold |= (uint32_t)*z->at++ << z->held;
    }
    uint32_t value = z->hold & (((uint32_t)1 << n) - 1);
    z->hold >>= n, z->held -= n;
    return value;
}

/* Refuses codes that are not complete, but for one with a single symbol of one bit, or with none at all. */
static void make_huffman(inflater *z, huffman *h, const uint8_t *lengths, uint32_t n) {
    uint32_t offset[17] = {0};
    int32_t left = 1;
    memset(h->count, 0, sizeof h->count);
    for (uint32_t i = 0; i < n; i++) h->count[lengths[i]]++;
    for (uint32_t i = 1; i < 16 && left >= 0; i++)
        left = left * 2 - h->count[i], offset[i + 1] = offset[i] + h->count[i];
    if (left != 0 && (h->count[0] + h->count[1] < (int32_t)n || h->count[1] > 1)) z->failed = 1;
    for (uint32_t i = 0; i < n; i++)
        if (lengths[i] > 0) h->symbol[offset[lengths[i]]++] = (uint16_t)i;
}

static uint32_t next_symbol(inflater *z, const huffman *h) {
    for (uint32_t length = 1, code = 0, first = 0, index = 0; length < 16 && !z->failed; length++) {
        code = code << 1 | next_bits(z, 1);
        if (code < first + h->count[length]) return h->symbol[index + code - first];
        index += h->count[length], first = (first + h->count[length]) << 1;
    }
    z->failed = 1;
    return 0;
}

static void read_codes(inflater *z, huffman *literals, huffman *distances) {
    static const uint8_t order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    uint8_t lengths[320] = {0};
    uint32_t nl = next_bits(z, 5) + 257, nd = next_bits(z, 5) + 1, nc = next_bits(z, 4) + 4;
    for (uint32_t i = 0; i < nc; i++) lengths[order[i]] = (uint8_t)next_bits(z, 3);
    make_huffman(z, literals, lengths, 19);
    if (nl > 286 || nd > 30) z->failed = 1;
    for (uint32_t i = 0; i < nl + nd && !z->failed;) {
        uint32_t symbol = next_symbol(z, literals);
        if (symbol == 16 && i == 0) z->failed = 1;
        uint8_t last = (uint8_t)(symbol < 16 ? symbol : symbol == 16 && i > 0 ? lengths[i - 1] : 0);
        uint32_t repeat = symbol < 16 ? 1 : symbol < 18 ? 3 + next_bits(z, symbol == 16 ? 2 : 3) : 11 + next_bits(z, 7);
        if (i + repeat > nl + nd) z->failed = 1;
        else for (; repeat > 0; repeat--) lengths[i++] = last;
    }
    if (z->failed || lengths[256] == 0) z->failed = 1;
    else make_huffman(z, literals, lengths, nl), make_huffman(z, distances, lengths + nl, nd);
}

/* Returns whether one deflate stream gave exactly the total, out of exactly the bytes that there are. */
static int inflate(inflater *z) {
    huffman literals, distances;
    uint32_t last, type, size, symbol;
    do {
        last = next_bits(z, 1), type = next_bits(z, 2);
        if (type == 0) { /* stored, from the next byte on */
            z->hold = z->held = 0, size = next_bits(z, 16);
            if (next_bits(z, 16) != (size ^ 0xffffu)) return 0;
            for (; size > 0 && !z->failed; size--) put(z, (uint8_t)next_bits(z, 8));
            continue;
        }
        if (type == 3) return 0;
        if (type == 1) {
            uint8_t lengths[320];
            for (uint32_t i = 0; i < 320; i++) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : i < 288 ? 8 : 5;
            make_huffman(z, &literals, lengths, 288), make_huffman(z, &distances, lengths + 288, 32);
        } else {
            read_codes(z, &literals, &distances);
        }
        while (!z->failed && (symbol = next_symbol(z, &literals)) != 256) {
            if (symbol < 256) put(z, (uint8_t)symbol);
            if (symbol < 256) continue;
            if ((symbol -= 257) > 28) return 0; /* lengths 3 to 10; two bits and more and more extra ones; 258 */
            uint32_t extra = symbol < 8 || symbol == 28 ? 0 : symbol / 4 - 1;
            size = symbol < 8 ? symbol + 3 : symbol == 28 ? 258 : ((4 + symbol % 4) << extra) + 3 + next_bits(z, extra);
            if ((symbol = next_symbol(z, &distances)) > 29) return 0; /* 1, 2; one bit and more and more extra ones */
            extra = symbol < 2 ? 0 : symbol / 2 - 1;
            uint32_t distance = symbol < 2 ? symbol + 1 : ((2 + symbol % 2) << extra) + 1 + next_bits(z, extra);
            if (distance > z->written) return 0;
            for (; size > 0 && !z->failed; size--) put(z, z->window[(z->written - distance) & z->mask]);
        }
    } while (!last && !z->failed);
    return !z->failed && z->written == z->total && z->at == z->end;
}

/* ---- Steps and rounding: section 4, and "Values" in section 7 ---- */
static const uint32_t OCTAVE[65] = {
    1073741824, 1085434105, 1097253708, 1109202017, 1121280435, 1133490379, 1145833280, 1158310586, 1170923761,
    1183674285, 1196563653, 1209593377, 1222764985, 1236080023, 1249540052, 1263146651, 1276901416, 1290805961,
    1304861916, 1319070931, 1333434672, 1347954823, 1362633089, 1377471191, 1392470868, 1407633882, 1422962010,
    1438457050, 1454120821, 1469955158, 1485961920, 1502142985, 1518500249, 1535035633, 1551751075, 1568648537,
    1585729999, 1602997467, 1620452965, 1638098541, 1655936264, 1673968228, 1692196547, 1710623359, 1729250826,
    1748081133, 1767116488, 1786359125, 1805811301, 1825475297, 1845353419, 1865448001, 1885761398, 1906295993,
    1927054195, 1948038440, 1969251187, 1990694927, 2012372173, 2034285470, 2056437386, 2078830521, 2101467501,
    2124350982, 2147483648,
};

/* For exponents within +-64000, where the power of two and the step are normal numbers and exact. */
static double step_of(int32_t exponent) {
    uint32_t shifted = (uint32_t)(exponent + 65536); /* by 1024 octaves; a float64 has a bias of 1023 */
    uint64_t bits = (uint64_t)(shifted / 64 - 1) << 52;
    double octaves;
    memcpy(&octaves, &bits, 8);
    return (double)OCTAVE[shifted % 64] / 1073741824.0 * octaves;
}

/* A float64 (no NaN) rounded to nearest, ties to even, as the bits of a narrower type; beyond its range infinity.
 * In integers, since C leaves conversions out of range undefined and has no names for the 2-byte types. */
static uint32_t narrow(double value, uint32_t fraction, uint32_t exponent_bits) {
    uint64_t bits, infinity = (((uint64_t)1 << exponent_bits) - 1) << fraction;
    memcpy(&bits, &value, 8);
    int32_t exponent = (int32_t)(bits >> 52 & 2047), drop = 52 - (int32_t)fraction;
    uint64_t mantissa = (bits & (((uint64_t)1 << 52) - 1)) | (uint64_t)(exponent > 0) << 52;
    exponent += (1 << (exponent_bits - 1)) - 1 - 1023;
    /* Subnormal numbers share the exponent of the smallest normal ones. With drop = 54 nothing is left. */
    if (exponent < 1) drop = drop + 1 - exponent < 54 ? drop + 1 - exponent : 54, exponent = 1;
    uint64_t kept = mantissa >> drop, rest = mantissa - (kept << drop), half = (uint64_t)1 << (drop - 1);
    if (rest > half || (rest == half && (kept & 1))) kept++;
    kept += (uint64_t)(exponent - 1) << fraction; /* to which a normal number's leading bit adds one */
    return (uint32_t)(bits >> 63) << (fraction + exponent_bits) | (uint32_t)(kept < infinity ? kept : infinity);
}

static float to_float32(double value) {
    uint32_t bits = narrow(value, 23, 8);
    float result;
    memcpy(&result, &bits, 4);
    return result;
}
/* A float32 value, converted to the dtype, as entry i of the output. */
static void write_value(uint8_t *out, uint64_t i, uint32_t dtype, float value) {
    double wide = (double)value;
    uint16_t half = (uint16_t)(dtype == FPK_FLOAT16 ? narrow(wide, 10, 5) : narrow(wide, 7, 8));
    const void *from = dtype == FPK_FLOAT32 ? (void *)&value : dtype == FPK_FLOAT64 ? (void *)&wide : (void *)&half;
    memcpy(out + i * DTYPE_OUT[dtype], from, DTYPE_OUT[dtype]);
}

/* ---- Symbol models: section 6 ---- */
typedef struct {
    uint32_t kind, size, escape, order;
    const uint8_t *bytes;       /* of the weights; NULL for a single symbol without one */
    int32_t low;
    uint32_t alphabet, symbols; /* how many; `symbols` with the escape, which is the last one */
    uint32_t present, escapes;  /* how many have a frequency above zero; whether the escape has */
    uint16_t *before;           /* [s]: the sum of the frequencies before symbol s; [symbols]: 2^14 */
} model;

static uint64_t power(int64_t n) { /* P(n), near 2^(n/16384), for n in 0..38*16384 */
    uint32_t i = (uint32_t)(n >> 8) & 63, r = (uint32_t)n & 255;
    return ((uint64_t)OCTAVE[i] * (256 - r) + (uint64_t)OCTAVE[i + 1] * r) >> (38 - (n >> 14));
}
static uint64_t weight_of(const model *m, uint32_t s) {
    int64_t j = s < m->size ? (int64_t)m->size - s : (int64_t)s - m->size;
    if (m->kind == 1) {
        int64_t b = s == m->alphabet ? m->escape : m->bytes ? m->bytes[s] : 256;
        return b == 256 ? 1 : b == 0 ? 0 : power(65536 + 1024 * b);
    }
    if (j == 0 || s == m->alphabet) {
        int64_t z = s == m->alphabet ? m->escape : m->size > 0 ? m->bytes[0] : 128;
        return power(2048 * (z - 128) + 327680);
    }
    int64_t t = m->size > 1 ? m->bytes[1] : 0, u = m->size > 2 ? m->bytes[2] : 0;
    int64_t n = 327680 - (j - 1) * 4 * t * t - (j - 1) * (j - 2) / 2 * u * u;
    return power(n > 0 ? n : 0);
}

static void read_model(decoder *d, model *m) {
    uint32_t head = read_varint(d), escaped = head >> 1 & 1;
    int64_t low = head & 1 ? read_zigzag(d) : -(int64_t)(head >> 2);
    m->kind = head & 1, m->size = head >> 2;
    if (refuse(d, m->size > (m->kind ? 4094u : 2047u) || beyond(low, 2 * LIMIT_INTEGER) ||
               beyond(low + m->size, 2 * LIMIT_INTEGER), FPK_ERROR_MODEL)) return;
    if (m->kind == 0) m->bytes = read_bytes(d, m->size < 3 ? m->size : 3);
    else if (m->size > 0 || escaped) m->bytes = read_bytes(d, m->size + 1);
    if (escaped) m->escape = read_byte(d), m->order = read_byte(d);
    if (refuse(d, m->order > 24 || (escaped && m->kind && m->escape == 0), FPK_ERROR_MODEL)) return;
    m->low = (int32_t)low, m->alphabet = (m->kind ? m->size : 2 * m->size) + 1, m->symbols = m->alphabet + escaped;
    uint64_t sum = 0, w = 0;
    for (uint32_t s = 0; s < m->symbols; s++, sum += w, m->present += w > 0) w = weight_of(m, s);
    m->escapes = escaped && w > 0;
    m->before = take(d, (uint64_t)m->symbols + 1, 2);
    if (refuse(d, sum == 0, FPK_ERROR_MODEL) || d->measuring) return;
    int32_t rest = 1 << TOTAL_BITS;
    uint32_t largest = 1;
    for (uint32_t s = 1; s <= m->symbols; s++) { /* before[s] is the frequency of symbol s - 1, until they are summed */
        w = weight_of(m, s - 1); /* below 2^36 */
        m->before[s] = (uint16_t)(w > 0 && (w << TOTAL_BITS) < sum ? 1 : (w << TOTAL_BITS) / sum);
        rest -= m->before[s];
        if (m->before[s] > m->before[largest]) largest = s;
    }
    if (refuse(d, (rest += m->before[largest]) < 1, FPK_ERROR_MODEL)) return;
    m->before[largest] = (uint16_t)rest, m->before[0] = 0;
    for (uint32_t s = 1; s <= m->symbols; s++) m->before[s] = (uint16_t)(m->before[s] + m->before[s - 1]);
}

/* ---- Streams of integers: section 5 ---- */
typedef struct {
    uint64_t rows, columns, count;               /* columns: of a matrix */
    int64_t least, most;                         /* what the integers have to lie within */
    enum { MATRIX, RUNS, CLASSES } place;
    const struct fpk_entry *run;                 /* of RUNS: the vector whose entries the current one has */
    uint32_t contexts;
    const int32_t *row_classes, *column_classes; /* NULL: all 0 */
    uint64_t row, column;                        /* of the integer whose context next_context() tells */
} stream;

static stream matrix(uint64_t rows, uint64_t columns, int64_t least, int64_t most) {
    return (stream){rows, columns, rows * columns, least, most, MATRIX, NULL, 1, NULL, NULL, 0, 0};
}
static uint32_t next_context(stream *s) {
    uint32_t context = 0;
    if (s->contexts == 1) return 0;
    for (; s->column == (s->run ? s->run->entries : s->columns); s->column = 0, s->row++)
        if (s->run) do s->run++; while (s->run->kind != FPK_VECTOR);
    if (s->row_classes) context += (uint32_t)s->row_classes[s->row];
    if (s->column_classes) context += (uint32_t)s->column_classes[s->column];
    s->column++;
    return context < s->contexts ? context : s->contexts - 1;
}
static int32_t *read_stream(decoder *d, stream s);

static int32_t *read_classes(decoder *d, uint64_t count, uint32_t contexts) {
    stream run = matrix(1, count, 0, contexts - 1);
    uint32_t bits = read_byte(d);
    run.place = CLASSES;
    if (refuse(d, bits > 4, FPK_ERROR_STREAM)) return NULL;
    if (bits == 0) return read_stream(d, run);
    const uint8_t *p = read_bytes(d, (count * bits + 7) / 8);
    int32_t *classes = take(d, count, 4);
    uint64_t at = 0;
    if (d->error || d->measuring) return NULL;
    for (uint64_t i = 0; i < count; i++) {
        classes[i] = (int32_t)get_bits(p, &at, bits);
        refuse(d, classes[i] > run.most, FPK_ERROR_STREAM);
    }
    refuse(d, get_bits(p, &at, (8 - at % 8) % 8) != 0, FPK_ERROR_STREAM);
    return classes;
}

/* The symbols; escaped integers remain to be read. Where no model has two symbols, nothing is coded: a state of 2^16
 * then stays what it is and gives the only ones that there are. */
static void read_symbols(decoder *d, const model *models, stream c, uint32_t coded, int32_t *values) {
    uint32_t head = coded ? read_varint(d) : 0, lanes = head & 1 ? read_varint(d) : 1, lane = 0;
    if (refuse(d, lanes > c.count || lanes < 1 + (head & 1), FPK_ERROR_RANS)) return;
    const uint8_t *start = read_bytes(d, coded ? 4 * (uint64_t)lanes : 0);
    const uint8_t *word = read_bytes(d, 2 * (uint64_t)(head >> 1));
    uint32_t *states = take(d, lanes, 4);
    if (d->error || d->measuring) return;
    for (uint32_t i = 0; i < lanes; i++) {
        states[i] = coded ? get_u32(start + 4 * (uint64_t)i) : LOW_STATE;
        if (refuse(d, states[i] < LOW_STATE, FPK_ERROR_RANS)) return;
    }
    for (uint64_t i = 0; i < c.count; i++) {
        const model *m = &models[next_context(&c)];
        uint32_t x = states[lane], slot = x & ((1u << TOTAL_BITS) - 1), s = 0;
        for (uint32_t above = m->symbols; above - s > 1;) { /* to the last symbol with before[s] <= slot */
            uint32_t middle = (s + above) / 2;
            if (m->before[middle] <= slot) s = middle;
            else above = middle;
        }
        values[i] = s == m->alphabet ? ESCAPED : m->low + (int32_t)s;
        x = (uint32_t)(m->before[s + 1] - m->before[s]) * (x >> TOTAL_BITS) + slot - m->before[s];
        if (x < LOW_STATE) {
            if (refuse(d, word == d->at, FPK_ERROR_RANS)) return;
            x = x << 16 | get_u16(word), word += 2;
        }
        states[lane] = x, lane = lane + 1 < lanes ? lane + 1 : 0;
    }
    refuse(d, word != d->at, FPK_ERROR_RANS);
    for (uint32_t i = 0; i < lanes; i++) refuse(d, states[i] != LOW_STATE, FPK_ERROR_RANS);
}

static void read_escapes(decoder *d, const model *models, stream c, int32_t *values) {
    uint64_t size = read_varint(d), bits = size * 8, at = 0;
    const uint8_t *p = read_bytes(d, size);
    if (d->error || d->measuring) return;
    for (uint64_t i = 0; i < c.count; i++) { /* the prefixes of all, which tell where the rest begins */
        uint32_t one = values[i] != ESCAPED;
        for (; !one && at < bits && values[i] <= ESCAPED + 26; values[i] += !one) one = get_bits(p, &at, 1);
        if (refuse(d, !one, FPK_ERROR_ESCAPES)) return;
    }
    for (uint64_t i = 0; i < c.count; i++) {
        const model *m = &models[next_context(&c)];
        if (values[i] > ESCAPED + 26) continue;
        uint32_t digits = m->order + (uint32_t)values[i] - (uint32_t)ESCAPED; /* g + q */
        if (refuse(d, digits > 26 || bits - at < 1 + digits, FPK_ERROR_ESCAPES)) return;
        uint32_t sign = get_bits(p, &at, 1), number = ((uint32_t)1 << digits) | get_bits(p, &at, digits); /* D */
        int32_t distance = (int32_t)number - ((int32_t)1 << m->order);
        values[i] = sign ? m->low - 1 - distance : m->low + (int32_t)m->alphabet + distance;
    }
    refuse(d, bits - at >= 8 || get_bits(p, &at, (uint32_t)(bits - at)) != 0, FPK_ERROR_ESCAPES);
}

/* The integers of a stream, in work memory that stays taken; NULL after an error and while measuring. */
static int32_t *read_stream(decoder *d, stream s) {
    uint32_t head = read_byte(d), coded = 0, escapes = 0;
    int64_t centre = head & 64 ? read_zigzag(d) : 0;
    int32_t *values = take(d, s.count, 4);
    uint64_t mark = d->used;
    if (refuse(d, head & 128 || (s.place == CLASSES && (head & ~64u)) || beyond(centre, LIMIT_INTEGER) ||
               (head & 32 && (s.place != MATRIX || s.columns == 0)), FPK_ERROR_STREAM)) return NULL;
    s.contexts = (head & 15) + 1;
    if (head & 16) s.row_classes = read_classes(d, s.rows, s.contexts);
    if (head & 32) s.column_classes = read_classes(d, s.columns, s.contexts);
    model models[16];
    memset(models, 0, sizeof models);
    for (uint32_t k = 0; k < s.contexts && !d->error; k++) {
        read_model(d, &models[k]);
        coded |= models[k].present > 1, escapes |= models[k].escapes;
    }
    if (s.count > 0) read_symbols(d, models, s, coded, values);
    if (escapes) read_escapes(d, models, s, values);
    d->used = mark;
    if (d->error || d->measuring) return NULL;
    for (uint64_t i = 0; i < s.count; i++) {
        int64_t value = values[i] + centre;
        if (refuse(d, value < s.least || value > s.most, FPK_ERROR_STREAM)) return NULL;
        values[i] = (int32_t)value;
    }
    return values;
}

/* ---- Weights: section 7 ---- */
enum { DIRECT, SPARSE_PCA, SVD, VQ, SEPARABLE };

typedef struct {
    uint32_t bits;
    int32_t exponent;
    const int32_t *exponents; /* of each line; NULL: all have the one */
} grid;

typedef struct {
    uint64_t m, n, rest, depth, d, N;                /* rest: s1·s2·... */
    uint32_t transposed, axes, kernel[FPK_MAX_AXES]; /* the kernel: axes behind the second of more than one entry */
} tiling;

static int32_t read_exponent(decoder *d) {
    int64_t exponent = read_zigzag(d);
    return refuse(d, beyond(exponent, LIMIT_EXPONENT), FPK_ERROR_WEIGHT) ? 0 : (int32_t)exponent;
}
static grid read_grid(decoder *d, uint64_t lines) {
    uint32_t head = read_byte(d);
    grid g = {head & ~64u, 0, NULL};
    if (refuse(d, g.bits < 1 || g.bits > 25, FPK_ERROR_WEIGHT)) return g;
    if (head & 64) g.exponents = read_stream(d, matrix(1, lines, -LIMIT_EXPONENT, LIMIT_EXPONENT));
    else g.exponent = read_exponent(d);
    return g;
}
static double grid_step(const grid *g, uint64_t line) {
    return (double)to_float32(step_of(g->exponents ? g->exponents[line] : g->exponent));
}
static stream on_grid(const grid *g, uint64_t rows, uint64_t columns) {
    int64_t limit = (int64_t)1 << (g->bits - 1);
    return matrix(rows, columns, -limit, limit - 1);
}

/* "Tilings", and what "Separable" asks of the shape. */
static tiling read_tiling(decoder *d, const struct fpk_entry *e, const uint32_t *shape, uint32_t form) {
    tiling t;
    uint32_t flags = read_byte(d), g = flags & 2 ? read_varint(d) : 1;
    memset(&t, 0, sizeof t);
    t.depth = flags & 4 ? read_varint(d) : 0;
    if (refuse(d, form > SEPARABLE || flags > 7 || e->axes < 2 || e->entries == 0, FPK_ERROR_WEIGHT) ||
        refuse(d, g < 1 + (flags >> 1 & 1) || (flags & 4 && t.depth == 0), FPK_ERROR_WEIGHT) ||
        refuse(d, shape[0] % g != 0 || t.depth > e->entries, FPK_ERROR_WEIGHT)) return t;
    t.transposed = flags & 1, t.rest = e->entries / shape[0];
    t.m = t.transposed ? g * t.rest : shape[0], t.n = t.transposed ? shape[0] / g : t.rest;
    t.d = t.depth ? t.depth : t.m, t.N = t.depth ? (e->entries + t.d - 1) / t.d : t.n;
    uint64_t product = 1;
    for (uint32_t a = 2; a < e->axes; a++)
        if (shape[a] > 1) t.kernel[t.axes++] = shape[a], product *= shape[a];
    refuse(d, t.d * t.N > LIMIT_ENTRIES || (form == SEPARABLE && (t.axes == 0 || t.transposed || product != t.depth ||
           product > 65536)), FPK_ERROR_WEIGHT);
    return t;
}

/* Where in the tensor, row by row, entry (i, j) of the tiles lies; LIMIT_ENTRIES for one that only fills up. */
static uint64_t entry_at(const tiling *t, uint64_t i, uint64_t j) {
    uint64_t at = t->depth ? j * t->d + i : i * t->n + j, row = at / t->n, column = at % t->n;
    if (at >= t->m * t->n) return LIMIT_ENTRIES;
    return t->transposed ? (row / t->rest * t->n + column) * t->rest + row % t->rest : at;
}

/* The Kronecker product of the factors and the bits of its grid; while measuring, these stay as they are. */
static int32_t *read_factors(decoder *d, const tiling *t, uint32_t *bits) {
    int32_t *basis = take(d, t->d * t->d, 4), low = 0, high = 0;
    uint64_t mark = d->used, p = 1, q, largest = 1;
    if (basis) basis[0] = 1;
    for (uint32_t a = 0; a < t->axes && !d->error; a++, p *= q, d->used = mark) {
        q = t->kernel[a];
        int32_t *factor = take(d, q * q, 4);
        uint64_t most = 0;
        for (uint64_t i = 0; i < q * q && !d->error; i++) {
            int64_t value = read_zigzag(d);
            if (factor) factor[i] = (int32_t)value;
            if (beyond(value, (int64_t)most)) most = (uint64_t)(value < 0 ? -value : value);
        }
        largest = largest * most < LIMIT_ENTRIES ? largest * most : LIMIT_ENTRIES;
        /* From (p, p) to (p·q, p·q) in place, from the end on, where no entry lies before the one it is made of. If
         * the largest is too large, it is refused below, or factors of zeros follow: then all are 0 in the end. */
        for (uint64_t i = factor ? p * q * p * q : 0; i-- > 0;) {
            uint64_t row = i / (p * q), column = i % (p * q);
            int64_t value = largest > (uint64_t)LIMIT_INTEGER ? 0 : factor[row % q * q + column % q];
            basis[i] = (int32_t)(basis[row / q * p + column / q] * value);
        }
    }
    if (refuse(d, largest > (uint64_t)LIMIT_INTEGER, FPK_ERROR_WEIGHT) || d->measuring) return NULL;
    for (uint64_t i = 0; i < p * p; i++)
        low = basis[i] < low ? basis[i] : low, high = basis[i] > high ? basis[i] : high;
    for (*bits = 1; low < -((int64_t)1 << (*bits - 1)) || high >= (int64_t)1 << (*bits - 1);) ++*bits;
    refuse(d, *bits > 25, FPK_ERROR_WEIGHT);
    return basis;
}

/* "Values", for a block of columns at a time, whose sums and codes stay near the processor. */
static void write_weight(const tiling *t, uint32_t form, uint64_t k, const grid *rows, const int32_t *basis,
                         const grid *columns, const int32_t *codes, uint32_t dtype, uint8_t *out) {
    uint64_t along_k = form == SEPARABLE ? 1 : t->N, along_N = form == SEPARABLE ? k : 1; /* codes are Z, or Z^T */
    double column_steps[BLOCK];
    int64_t product[BLOCK];
    for (uint64_t start = 0, size; start < t->N; start += size) {
        size = t->N - start < BLOCK ? t->N - start : BLOCK;
        for (uint64_t j = 0; j < size; j++) column_steps[j] = grid_step(columns, start + j);
        for (uint64_t i = 0; i < t->d; i++) {
            memset(product, 0, sizeof product);
            for (uint64_t j = 0; form == DIRECT && j < size; j++) product[j] = codes[i * t->N + start + j];
            for (uint64_t j = 0; form == VQ && j < size; j++) product[j] = basis[i * k + (uint64_t)codes[start + j]];
            for (uint64_t r = 0; form != DIRECT && form != VQ && r < k; r++) {
                const int32_t *z = codes + r * along_k + start * along_N;
                int64_t factor = basis[i * k + r];
                for (uint64_t j = 0; factor != 0 && j < size; j++) product[j] += factor * z[j * along_N];
            }
            double row_step = grid_step(rows, i);
            for (uint64_t j = 0; j < size; j++) {
                uint64_t at = entry_at(t, i, start + j);
                if (at == LIMIT_ENTRIES) continue;
                write_value(out, at, dtype, to_float32((double)product[j] * (row_step * column_steps[j])));
            }
        }
    }
}

static void decode_weight(decoder *d, const struct fpk_entry *e, const uint32_t *shape, uint8_t *out) {
    uint32_t form = read_byte(d), sums = form != DIRECT && form != VQ;
    tiling t = read_tiling(d, e, shape, form);
    if (d->error) return;
    grid rows = {1, 0, NULL}, columns = {1, 0, NULL}; /* the step 2^0 is that of VQ's columns */
    int32_t *basis = NULL;
    uint64_t k = t.d, wide = t.d > t.N ? t.d : t.N;
    if (form != SEPARABLE) rows = read_grid(d, t.d);
    else rows.exponent = read_exponent(d);
    if (form != SEPARABLE && form != DIRECT) k = read_varint(d);
    if (refuse(d, form != DIRECT && (k == 0 || k > wide || k * (form == VQ ? t.d : wide) > LIMIT_ENTRIES),
               FPK_ERROR_WEIGHT)) return;
    if (form == SEPARABLE) basis = read_factors(d, &t, &rows.bits);
    else if (form != DIRECT) basis = read_stream(d, on_grid(&rows, t.d, k));
    if (form != VQ) columns = read_grid(d, t.N);
    /* 2^(bits - 1) of both grids, multiplied with k, have to stay below 2^53. */
    if (d->error || refuse(d, sums && k >> (55 - rows.bits - columns.bits) > 0, FPK_ERROR_WEIGHT)) return;
    stream s = on_grid(&columns, form == SEPARABLE ? shape[0] : k, form == SEPARABLE ? shape[1] * t.d : t.N);
    if (form == VQ) s = matrix(1, t.N, 0, (int64_t)k - 1 < LIMIT_INTEGER ? (int64_t)k - 1 : LIMIT_INTEGER);
    const int32_t *codes = read_stream(d, s);
    if (refuse(d, d->at != d->end, FPK_ERROR_TRAILING) || d->measuring) return;
    write_weight(&t, form, k, &rows, basis, &columns, codes, e->dtype, out);
}

/* ---- Small and exact tensors: sections 8 and 9 ---- */
/* Writes the one that is wanted; the bounds of all others are checked as well. */
static void decode_vectors(decoder *d, const fpk_file *file, const struct fpk_entry *wanted, uint8_t *out) {
    const double most = 340282346638528859811704183484516925440.0; /* the largest float32 */
    const struct fpk_entry *e = file->entries;
    stream one = matrix(1, file->vectors, -LIMIT_INTEGER, LIMIT_INTEGER), runs = one;
    if (refuse(d, file->vector_entries > LIMIT_ENTRIES, FPK_ERROR_VECTOR)) return;
    while (e->kind != FPK_VECTOR) e++;
    runs.place = RUNS, runs.rows = file->vectors, runs.count = file->vector_entries, runs.run = e;
    const int32_t *scales = read_stream(d, matrix(1, file->vectors, 0, 1)), *exponents = read_stream(d, one);
    const int32_t *offsets = read_stream(d, one), *integers = read_stream(d, runs);
    if (refuse(d, d->at != d->end, FPK_ERROR_TRAILING) || d->measuring) return;
    for (uint32_t v = 0; v < file->vectors; e++) {
        if (e->kind != FPK_VECTOR) continue;
        if (refuse(d, !scales[v] && beyond(exponents[v], LIMIT_EXPONENT), FPK_ERROR_VECTOR)) return;
        for (uint64_t i = 0; i < e->entries; i++) {
            int64_t sum = (int64_t)offsets[v] + integers[i], exponent = sum * exponents[v];
            if (refuse(d, scales[v] && beyond(exponent, LIMIT_LOGARITHM), FPK_ERROR_VECTOR)) return;
            if (e != wanted) continue;
            double value = scales[v] ? step_of((int32_t)exponent) : (double)sum * step_of(exponents[v]);
            write_value(out, i, e->dtype, to_float32(value > most ? most : value < -most ? -most : value));
        }
        integers += e->entries, v++;
    }
}

static void decode_exact(decoder *d, const fpk_file *file, const struct fpk_entry *wanted, uint8_t *out) {
    const uint16_t one = 1;
    inflater z;
    memset(&z, 0, sizeof z);
    z.at = d->at, z.end = d->end, z.total = file->exact_bytes, z.mask = WINDOW - 1;
    z.window = take(d, WINDOW, 1);
    /* No byte inflates to more than 1032: what the record cannot hold is not even begun. */
    if (refuse(d, z.total / 1032 > (uint64_t)(d->end - d->at), FPK_ERROR_DEFLATE) || d->measuring) return;
    for (const struct fpk_entry *e = file->entries; e < wanted; e++)
        if (e->kind == FPK_EXACT) z.from += e->entries * DTYPE_STORED[e->dtype];
    z.to = z.from + wanted->entries * DTYPE_STORED[wanted->dtype];
    z.out = out, z.dtype = wanted->dtype;
    if (*(const uint8_t *)&one == 0) /* what has a byte order is an entry, or half a complex one: a power of two */
        z.flip = (DTYPE_OUT[z.dtype] >> (z.dtype == FPK_COMPLEX64 || z.dtype == FPK_COMPLEX128)) - 1u;
    refuse(d, !inflate(&z), FPK_ERROR_DEFLATE);
}

/* ---- The shell: section 2 ---- */
/* A JSON string as it stands between its quotes. Escapes are checked, not resolved: with one it equals no name here. */
typedef struct { const uint8_t *at; uint64_t size; } text;

static int text_is(text t, const char *name) { return t.size == strlen(name) && !memcmp(t.at, name, strlen(name)); }
static int next_is(decoder *d, uint8_t wanted) { /* behind white space; then it is consumed */
    while (d->at < d->end && (*d->at == ' ' || *d->at == '\t' || *d->at == '\n' || *d->at == '\r')) d->at++;
    if (d->error || d->at == d->end || *d->at != wanted) return 0;
    d->at++;
    return 1;
}
static void expect(decoder *d, uint8_t wanted) { refuse(d, !next_is(d, wanted), FPK_ERROR_SHELL); }
static int is_one_of(uint32_t c, const char *set) { return c > 0 && strchr(set, (int)c); }

static text read_string(decoder *d) {
    expect(d, '"');
    text t = {d->at, 0};
    while (!d->error && d->at < d->end && *d->at != '"') {
        uint32_t c = read_byte(d), escape = c == '\\' ? read_byte(d) : 'n';
        refuse(d, c < 0x20 || !is_one_of(escape, "\"\\/bfnrtu"), FPK_ERROR_SHELL);
        for (int i = 0; escape == 'u' && i < 4; i++)
            refuse(d, !is_one_of(read_byte(d), "0123456789abcdefABCDEF"), FPK_ERROR_SHELL);
    }
    t.size = (uint64_t)(d->at - t.at);
    expect(d, '"');
    return t;
}

/* A mark of JSON, and a number behind it. */
static void expect_number(decoder *d, uint8_t mark, uint64_t wanted) {
    uint8_t digits[20]; /* as many as 2^64 has */
    uint32_t first = 20;
    do digits[--first] = (uint8_t)('0' + wanted % 10); while ((wanted /= 10) > 0);
    expect(d, mark), expect(d, digits[first]);
    while (++first < 20) refuse(d, read_byte(d) != digits[first], FPK_ERROR_SHELL);
}

enum { HEADER, METADATA, TENSOR };
/* An object: the header, its metadata, or its one tensor, of whose axis the size is known. `seen` has a bit for each
 * key that has to be there once. */
static void read_object(decoder *d, int place, uint64_t size, uint32_t *seen) {
    static const char *const keys[6] = {"__metadata__", "factorpack", "factorpack", "dtype", "shape", "data_offsets"};
    static const uint8_t first[4] = {0, 2, 3, 6}; /* which of them belong to a place */
    expect(d, '{');
    if (next_is(d, '}')) return;
    do {
        text name = read_string(d);
        uint32_t key = first[place];
        while (key < first[place + 1] && !text_is(name, keys[key])) key++;
        expect(d, ':');
        int other = key == first[place + 1]; /* ignored among the metadata */
        if (refuse(d, other ? place != METADATA : (*seen & 1u << key) != 0, FPK_ERROR_SHELL)) return;
        *seen |= other ? 0 : 1u << key;
        if (other) (void)read_string(d);
        else if (key == 0) read_object(d, METADATA, size, seen);
        else if (key == 1) read_object(d, TENSOR, size, seen);
        else if (key == 2) refuse(d, !text_is(read_string(d), "0.1"), FPK_ERROR_VERSION);
        else if (key == 3) refuse(d, !text_is(read_string(d), "U8"), FPK_ERROR_SHELL);
        else if (key == 4) expect_number(d, '[', size), expect(d, ']');
        else expect_number(d, '[', 0), expect_number(d, ',', size), expect(d, ']');
    } while (next_is(d, ','));
    expect(d, '}');
}

/* Leaves d at the start of the blob. */
static void read_shell(decoder *d) {
    const uint8_t *sizes = read_bytes(d, 8), *end = d->end;
    uint32_t size = sizes ? get_u32(sizes) : 0, seen = 0;
    /* safetensors allows 100,000,000 bytes. */
    if (refuse(d, sizes && (get_u32(sizes + 4) != 0 || size > 100000000u), FPK_ERROR_SHELL)) return;
    const uint8_t *header = read_bytes(d, size), *blob = d->at;
    if (d->error || refuse(d, size == 0 || *header != '{' || !is_utf8(header, size), FPK_ERROR_SHELL)) return;
    d->at = header, d->end = blob;
    read_object(d, HEADER, (uint64_t)(end - blob), &seen);
    (void)next_is(d, ' '); /* never is, but skips what the header is filled up with */
    refuse(d, d->at != d->end || seen != 63, FPK_ERROR_SHELL);
    d->at = blob, d->end = end;
}

/* ---- The index: section 3 ---- */
static int compare_names(const fpk_file *file, uint32_t i, uint32_t j) {
    const struct fpk_entry *a = file->entries + i, *b = file->entries + j;
    uint32_t shorter = a->name_size < b->name_size ? a->name_size : b->name_size;
    int order = memcmp(file->index + a->name_at, file->index + b->name_at, shorter);
    return order ? order : a->name_size < b->name_size ? -1 : a->name_size > b->name_size;
}
/* Whether all names differ: heapsort, which needs no stack and has no bad case. */
static int names_differ(const fpk_file *file, uint32_t *heap, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) heap[i] = i;
    for (uint32_t start = count / 2, size = count, child; size > 1;) {
        uint32_t moved = heap[start > 0 ? --start : --size], at = start; /* makes the heap, then takes its largest */
        if (size < count) heap[size] = heap[0];
        for (; (child = 2 * at + 1) < size; at = child) {
            if (child + 1 < size && compare_names(file, heap[child + 1], heap[child]) > 0) child++;
            if (compare_names(file, heap[child], moved) <= 0) break;
            heap[at] = heap[child];
        }
        heap[at] = moved;
    }
    for (uint32_t i = 1; i < count; i++)
        if (compare_names(file, heap[i - 1], heap[i]) == 0) return 0;
    return 1;
}

/* The columns of the inflated index, into the entries; `at` is where in the blob the records start and then end. */
static void read_index(decoder *d, fpk_file *file, uint32_t *heap, uint64_t *at) {
    uint32_t T = file->tensors = read_varint(d), A = file->aliases = read_varint(d);
    const uint8_t *kinds = read_bytes(d, (uint64_t)T + A), *dtypes = read_bytes(d, T);
    struct fpk_entry *first = file->entries, *ties = first + T, *end = ties + A;
    for (struct fpk_entry *e = first; !d->error && e < ties; e++) {
        uint32_t axes = read_varint(d), i = e->target = (uint32_t)(e - first);
        e->kind = kinds[i], e->dtype = dtypes[i], e->axes = (uint8_t)axes;
        /* What factors make are float32 values: no other dtypes than floats can hold them. */
        refuse(d, axes > FPK_MAX_AXES || e->kind > FPK_EXACT || e->dtype >= sizeof DTYPE_OUT ||
               (e->kind != FPK_EXACT && e->dtype > FPK_FLOAT64), FPK_ERROR_INDEX);
    }
    for (struct fpk_entry *e = first; !d->error && e < ties; e++) {
        uint64_t bound = e->entries = 1;
        e->shape_at = (uint32_t)(d->at - file->index);
        for (uint32_t a = 0; a < e->axes && !d->error; a++) {
            uint32_t axis = read_varint(d);
            e->entries *= axis, bound *= axis ? axis : 1;
            refuse(d, bound > LIMIT_ENTRIES, FPK_ERROR_INDEX);
        }
        if (e->kind == FPK_VECTOR) file->vectors++, file->vector_entries += e->entries;
        if (e->kind == FPK_EXACT) file->exact_bytes += e->entries * DTYPE_STORED[e->dtype];
    }
    for (struct fpk_entry *e = ties; !d->error && e < end; e++) {
        uint32_t target = read_varint(d);
        if (refuse(d, target >= T || kinds[e - first] != FPK_ALIAS, FPK_ERROR_INDEX)) return;
        *e = first[target], e->kind = FPK_ALIAS;
    }
    for (uint32_t kind = FPK_WEIGHT; kind <= FPK_EXACT; kind++) {
        const struct fpk_entry *shared = NULL;
        for (struct fpk_entry *e = first; !d->error && e < ties; e++) {
            if (e->kind != kind) continue;
            e->record_size = shared ? shared->record_size : read_varint(d);
            e->record = shared ? shared->record : *at;
            if (!shared) *at += (uint64_t)e->record_size + 4;
            if (kind != FPK_WEIGHT) shared = e; /* weights have records of their own */
        }
    }
    if (d->error || refuse(d, !is_utf8(d->at, (uint64_t)(d->end - d->at)), FPK_ERROR_INDEX)) return;
    for (struct fpk_entry *e = first; e < end; e++) {
        e->name_at = (uint32_t)(d->at - file->index);
        while (d->at < d->end && *d->at != '\n') d->at++;
        e->name_size = (uint32_t)(d->at - file->index) - e->name_at;
        if (e + 1 < end && !refuse(d, d->at == d->end, FPK_ERROR_INDEX)) d->at++;
    }
    refuse(d, d->at != d->end || !names_differ(file, heap, T + A), FPK_ERROR_INDEX);
}

/* Reads up to the records: readies z to inflate the index, and tells T + A and what memory fpk_open needs. */
static void read_head(decoder *d, const uint8_t *data, size_t size, inflater *z, uint64_t *names, uint64_t *need) {
    memset(d, 0, sizeof *d), memset(z, 0, sizeof *z);
    d->at = data, d->end = data + size;
    read_shell(d);
    const uint8_t *head = read_bytes(d, 12);
    z->at = head ? read_bytes(d, get_u32(head)) : NULL;
    if (d->error) return;
    z->end = d->at, z->total = get_u32(head + 4), z->mask = UINT64_MAX;
    check_crc32(d, z->at, get_u32(head), head + 8);
    if (refuse(d, z->total > (uint32_t)1 << 28, FPK_ERROR_INDEX)) return;
    uint8_t counts[10]; /* T and A, which the index starts with */
    inflater peek = *z;
    peek.window = counts, peek.total = z->total < 10 ? z->total : 10;
    (void)inflate(&peek);
    if (refuse(d, peek.written < peek.total, FPK_ERROR_DEFLATE)) return;
    decoder index = {counts, counts + peek.total, NULL, 0, 0, 0, 0, FPK_OK};
    *names = read_varint(&index);
    *names += read_varint(&index);
    refuse(d, index.error != FPK_OK, index.error);
    refuse(d, *names > z->total / 3, FPK_ERROR_INDEX); /* of a name there are a kind, a dtype or tie, and a byte 0a */
    *need = *names * (sizeof(struct fpk_entry) + sizeof(uint32_t)) + z->total + 7; /* 7: to be aligned to 8 */
    refuse(d, *need > SIZE_MAX / 2, FPK_ERROR_MEMORY);
}

/* ---- The functions of the header ---- */
static void *aligned(void *work) { return (uint8_t *)work + (-(uintptr_t)work & 7); }

fpk_error fpk_open_need(const void *data, size_t size, size_t *work_size) {
    decoder d;
    inflater z;
    uint64_t names, need = 0;
    if (!data || !work_size) return FPK_ERROR_ARGUMENT;
    read_head(&d, data, size, &z, &names, &need);
    *work_size = (size_t)need;
    return d.error;
}

fpk_error fpk_open(fpk_file *file, const void *data, size_t size, void *work, size_t work_size) {
    decoder d;
    inflater z;
    uint64_t names, need;
    if (!file || !data || !work) return FPK_ERROR_ARGUMENT;
    memset(file, 0, sizeof *file);
    read_head(&d, data, size, &z, &names, &need);
    if (refuse(&d, need > work_size, FPK_ERROR_MEMORY)) return d.error;
    uint64_t at = (uint64_t)(d.at - z.at) + 12, blob_size = at + (uint64_t)(d.end - d.at);
    file->blob = z.at - 12, file->entries = aligned(work);
    uint32_t *heap = (void *)(file->entries + names);
    file->index = z.window = (uint8_t *)(heap + names);
    if (refuse(&d, !inflate(&z), FPK_ERROR_DEFLATE)) return d.error;
    d.at = file->index, d.end = d.at + z.total;
    read_index(&d, file, heap, &at);
    refuse(&d, at != blob_size, at > blob_size ? FPK_ERROR_TRUNCATED : FPK_ERROR_TRAILING);
    return d.error;
}

uint32_t fpk_count(const fpk_file *file) { return file ? file->tensors + file->aliases : 0; }

fpk_error fpk_info(const fpk_file *file, uint32_t i, fpk_tensor *tensor) {
    if (!file || !tensor || i >= fpk_count(file)) return FPK_ERROR_ARGUMENT;
    const struct fpk_entry *e = file->entries + i;
    const uint8_t *at = file->index + e->shape_at;
    decoder d = {at, at + 5 * FPK_MAX_AXES, NULL, 0, 0, 0, 0, FPK_OK}; /* at most as many bytes, checked by fpk_open */
    memset(tensor, 0, sizeof *tensor);
    tensor->name = (const char *)file->index + e->name_at, tensor->name_size = e->name_size;
    tensor->kind = (fpk_kind)e->kind, tensor->dtype = (fpk_dtype)e->dtype, tensor->target = e->target;
    tensor->axes = e->axes, tensor->entries = e->entries;
    for (uint32_t a = 0; a < e->axes; a++) tensor->shape[a] = read_varint(&d);
    return FPK_OK;
}

static fpk_error decode(decoder *d, const fpk_file *file, uint32_t i, uint8_t *out) {
    const struct fpk_entry *e = file->entries + file->entries[i].target;
    fpk_tensor t;
    d->at = file->blob + e->record, d->end = d->at + e->record_size;
    if (d->measuring) check_crc32(d, d->at, e->record_size, d->end);
    if (d->error || refuse(d, fpk_info(file, i, &t) != FPK_OK, FPK_ERROR_ARGUMENT)) return d->error;
    if (e->kind == FPK_WEIGHT) decode_weight(d, e, t.shape, out);
    else if (e->kind == FPK_VECTOR) decode_vectors(d, file, e, out);
    else decode_exact(d, file, e, out);
    return d->error;
}

fpk_error fpk_need(const fpk_file *file, uint32_t i, size_t *out_size, size_t *work_size) {
    if (!file || !out_size || !work_size || i >= fpk_count(file)) return FPK_ERROR_ARGUMENT;
    decoder d = {NULL, NULL, NULL, 0, 0, 0, 1, FPK_OK};
    if (decode(&d, file, i, NULL)) return d.error;
    uint64_t bytes = file->entries[i].entries * DTYPE_OUT[file->entries[i].dtype];
    if (bytes > SIZE_MAX / 2 || d.peak > SIZE_MAX / 2) return FPK_ERROR_MEMORY; /* more than objects can have */
    *out_size = (size_t)bytes, *work_size = (size_t)d.peak + 7;
    return FPK_OK;
}

fpk_error fpk_decode(const fpk_file *file, uint32_t i, void *out, size_t out_size, void *work, size_t work_size) {
    size_t out_need = 0, work_need = 0;
    fpk_error error = fpk_need(file, i, &out_need, &work_need);
    if (error) return error;
    if (!work || (!out && out_need > 0)) return FPK_ERROR_ARGUMENT;
    if (out_size < out_need || work_size < work_need) return FPK_ERROR_MEMORY;
    decoder d = {NULL, NULL, aligned(work), work_need - 7, 0, 0, 0, FPK_OK};
    return decode(&d, file, i, out);
}

const char *fpk_error_text(fpk_error error) {
    static const char *const texts[] = {
        "no error", "a null pointer, or no such tensor", "too little memory given, or more needed than a size_t tells",
        "no safetensors file with one tensor, `factorpack`, of U8 and one axis", "not a file of version 0.1",
        "fewer bytes than needed", "bytes behind the end of a record or of the blob", "a wrong checksum: damaged",
        "a varint longer than need be, or beyond 32 bits", "deflated data invalid, or of another size than expected",
        "the index", "a stream's head, classes, centre or integers", "a stream's symbol model", "a stream's rANS part",
        "a stream's escapes", "a weight's form, tiling, grids or factors", "the record of the small tensors",
    };
    return (size_t)error < sizeof texts / sizeof *texts ? texts[error] : "unknown error";
}
