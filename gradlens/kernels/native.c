/* The native kernel: every number of `fields.py` about a list of CPU tensors, in one pass over their bytes.
 *
 * A tensor is read in blocks that stay in the first-level cache. A block is brought into the form float[] or double[] (for most
 * tensors it is there already), then two or three short loops run over it, which the compiler turns into vector code:
 *
 *     look     integer work on the bits: largest, smallest, zeros, negatives, and the sign and exponent of an entry as a key
 *     add      the sums, in double
 *     count    the keys, into a table: the histogram and the quantiles; of a large tensor those of a sample, without `detail`
 *
 * That is the fast way, for float blocks in which everything is finite. Blocks with a NaN or an infinity, and float64 tensors, go
 * the careful way, which asks of each entry whether it counts. `reference.py` says what the numbers mean.
 *
 * No header of Python or torch is used: pointers come in, doubles go out (see native.py). Plain C99; with GCC or Clang on
 * x86-64 the inner function is compiled three times and picked by what the processor has. Threads are plain POSIX threads.
 */

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#define HAVE_THREADS 1
#include <pthread.h>
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#if defined(__GNUC__) && defined(__x86_64__)
#define HAVE_VARIANTS 1
#include <xmmintrin.h>
#endif

/* --- what Python and C agree on ------------------------------------------------------------------------------------------- */

enum { EXPONENT_MIN = -96, EXPONENT_MAX = 31, BUCKETS = EXPONENT_MAX - EXPONENT_MIN + 1, TOP = 16, SAMPLES = 16 };

/* What quantiles rest on without `detail`: one LINE of entries of each of at most STRATA stretches of a tensor of more than LARGE. */
enum { LARGE = 1 << 16, STRATA = 1 << 10, LINE = 16, QUANTILES = 5 };
static const double QUANTILE[QUANTILES] = {0.05, 0.25, 0.5, 0.75, 0.95};

enum summary {
    NUMEL, POSITIVE, NEGATIVE, ZERO, NAN_, INF, SUM, ABS_SUM, SQUARE_SUM, MIN, MAX, ABS_MAX, ABS_MIN_NONZERO,
    WEIGHT_SQUARE_SUM, WEIGHT_ABS_MAX, DOT, WEIGHT_NONFINITE,
    FLIP_COMPARED, FLIP_MOVING, FLIP_COUNT, FLIP_DOT, FLIP_SQUARE_SUM, FLIP_PREVIOUS_SQUARE_SUM,
    QUANTILE_, TOP_PARTIAL = QUANTILE_ + QUANTILES, TOP_INDEX = TOP_PARTIAL + TOP, TOP_VALUE = TOP_INDEX + TOP,
    HISTOGRAM = TOP_VALUE + TOP, LIGHT_WIDTH = HISTOGRAM, WIDTH = HISTOGRAM + 2 * BUCKETS
};

enum update {
    UPDATE_NUMEL, UPDATE_SQUARE_SUM, UPDATE_BEFORE_SQUARE_SUM, UPDATE_USED_SQUARE_SUM, UPDATE_DOT, UPDATE_MOVING,
    UPDATE_AGAINST, UPDATE_STUCK, UPDATE_NONFINITE, UPDATE_LOSS_DOT, UPDATE_LOSS_EXACT, UPDATES
};

/* Python refuses a library whose text differs from what it makes of `fields.py`. The number is that of the calls' form. */
EXPORT const char *gradlens_columns(void) {
    return "4 | numel positive negative zero nan inf sum abs_sum square_sum min max abs_max abs_min_nonzero "
           "weight_square_sum weight_abs_max dot weight_nonfinite "
           "flip_compared flip_moving flip_count flip_dot flip_square_sum flip_previous_square_sum "
           "quantiles 0.05 0.25 0.5 0.75 0.95 of 65536 1024 16 top 16 histogram -96 31 | "
           "update_numel update_square_sum update_before_square_sum update_used_square_sum update_dot update_moving "
           "update_against update_stuck update_nonfinite update_loss_dot update_loss_exact";
}

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
static const int SIZE[] = {4, 8, 2, 2};

enum { OPERANDS = 5, READ = 4 };
enum { G, W, PREVIOUS, KEEP, COPY };     /* of summarize: KEEP gets G, COPY gets W; of sample the first alone */
enum { USED, BEFORE, AFTER, LOSS };      /* of compare */

/* One tensor and what belongs to it; a pointer of 0 where there is none. `layout` is where in `layouts` its axes stand: their
 * number, their lengths, and for each operand its strides in entries. 0: all are contiguous. */
typedef struct {
    int64_t pointer[OPERANDS];
    int64_t type[OPERANDS];
    int64_t count;
    int64_t layout;
} task;

/* --- reading ---------------------------------------------------------------------------------------------------------------- */

enum { BLOCK = 1024, AXES = 8 };

/* An operand as a walk through memory in logical order, or, when `axes` is 0, one straight line. */
typedef struct {
    char *base;
    int type, size, axes;
    int64_t length[AXES], stride[AXES]; /* in bytes, innermost last */
} walk;

/* Room for one block. */
typedef struct {
    float narrow[READ][BLOCK];
    double wide[READ][BLOCK];
    uint64_t raw[READ][BLOCK];
} room;

static walk walk_of(const task *t, const int64_t *layouts, int operand) {
    walk w = {.base = (char *)(intptr_t)t->pointer[operand], .type = (int)t->type[operand]};
    w.size = SIZE[w.type];
    if (t->layout == 0)
        return w;
    const int64_t *layout = layouts + t->layout;
    int axes = (int)layout[0];
    const int64_t *length = layout + 1, *stride = length + axes * (1 + operand);
    for (int axis = 0; axis < axes; axis++) {
        if (length[axis] == 1)
            continue;
        int64_t bytes = stride[axis] * w.size;
        if (w.axes && w.stride[w.axes - 1] == bytes * length[axis]) { /* goes on where the axis before it ends */
            w.length[w.axes - 1] *= length[axis];
            w.stride[w.axes - 1] = bytes;
        } else {
            w.length[w.axes] = length[axis];
            w.stride[w.axes++] = bytes;
        }
    }
    if (w.axes == 1 && w.stride[0] == w.size)
        w.axes = 0;
    return w;
}

INLINE void move_run(char *memory, int64_t stride, char *line, int64_t n, int size, int out) {
    for (int64_t i = 0; i < n; i++) {
        if (out)
            memcpy(memory + i * stride, line + i * size, (size_t)size);
        else
            memcpy(line + i * size, memory + i * stride, (size_t)size);
    }
}

/* Entries [start, start + n) in logical order from memory into a line, or out of the line into memory. */
static void move(const walk *w, int64_t start, int64_t n, char *line, int out) {
    int64_t at[AXES], rest = start;
    char *memory = w->base;
    for (int axis = w->axes - 1; axis >= 0; axis--) {
        at[axis] = rest % w->length[axis];
        rest /= w->length[axis];
        memory += at[axis] * w->stride[axis];
    }
    int last = w->axes - 1;
    while (n > 0) {
        int64_t run = w->length[last] - at[last];
        run = run < n ? run : n;
        switch (w->size) {
        case 2: move_run(memory, w->stride[last], line, run, 2, out); break;
        case 4: move_run(memory, w->stride[last], line, run, 4, out); break;
        default: move_run(memory, w->stride[last], line, run, 8, out);
        }
        n -= run;
        line += run * w->size;
        memory -= at[last] * w->stride[last];
        at[last] = 0;
        for (int axis = last - 1; axis >= 0; axis--) {
            memory += w->stride[axis];
            if (++at[axis] < w->length[axis])
                break;
            memory -= w->length[axis] * w->stride[axis];
            at[axis] = 0;
        }
    }
}

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE uint64_t bits_of_double(double value) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    return bits;
}

INLINE float half(uint16_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13;
    uint32_t bits = bits_of(from_bits(magnitude) * 0x1p112f); /* moves the exponent's zero from 15 to 127, denormals too */
    bits = (h & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : bits;
    return from_bits(bits | (uint32_t)(h & 0x8000) << 16);
}

/* The line of a walk's entries [start, start + n), as they are; in place where memory is that line. */
INLINE const void *line_of(const walk *w, int64_t start, int n, void *raw) {
    char *memory = w->base + start * w->size;
    if (w->axes == 0 && (uintptr_t)memory % (unsigned)w->size == 0)
        return memory;
    if (w->axes == 0)
        memcpy(raw, memory, (size_t)n * (size_t)w->size);
    else
        move(w, start, n, raw, 0);
    return raw;
}

INLINE const float *narrow(const void *line, int type, int n, float *out) {
    if (type == FLOAT32)
        return line;
    const uint16_t *in = line;
    if (type == BFLOAT16)
        for (int i = 0; i < n; i++)
            out[i] = from_bits((uint32_t)in[i] << 16);
    else
        for (int i = 0; i < n; i++)
            out[i] = half(in[i]);
    return out;
}

INLINE const double *wide(const void *line, int type, int n, float *between, double *out) {
    if (type == FLOAT64)
        return line;
    const float *in = narrow(line, type, n, between);
    for (int i = 0; i < n; i++)
        out[i] = in[i];
    return out;
}

/* --- what is known of a tensor ---------------------------------------------------------------------------------------------- */

/* A key is sign and biased float exponent: 9 bits. Zeros are not counted by key. */
enum { KEYS = 512, NEGATIVE_KEYS = 256, NOT_FINITE = 255, BIAS = 127 };

typedef struct {
    double magnitude, partial, value;
    int64_t index;
} entry;

/* By falling magnitude, equal ones by rising index. */
typedef struct {
    int count;
    entry best[TOP];
} largest;

typedef struct {
    int64_t zero, negative, nan, inf, compared, moving, flipped, weight_nonfinite;
    int64_t stride, sampled_zero; /* lines of a stratum, 0 where all keys are counted; zeros in the sample */
    double sum, abs_sum, square_sum, weight_square_sum, dot, flip_dot, flip_square_sum, flip_previous_square_sum;
    double low, high, abs_max, abs_min, weight_abs_max; /* infinite while there is nothing */
    double update[UPDATES];
    largest top;
    uint64_t keys[KEYS];
    int waiting; /* entries of the sample that have not been counted yet */
    float chosen[BLOCK];
} state;

static void begin(state *s, int counts, int64_t stride) {
    memset(s, 0, offsetof(state, top.best));
    if (counts)
        memset(s->keys, 0, sizeof s->keys);
    s->waiting = 0;
    s->stride = stride;
    s->low = s->abs_min = INFINITY;
    s->high = s->abs_max = s->weight_abs_max = -INFINITY;
}

INLINE double lesser(double a, double b) { return b < a ? b : a; }
INLINE double greater(double a, double b) { return b > a ? b : a; }

/* Whether the first goes before the second. */
INLINE int precedes(const entry *a, const entry *b) {
    return a->magnitude > b->magnitude || (a->magnitude == b->magnitude && a->index < b->index);
}

INLINE void insert(largest *top, const entry *one) {
    if (top->count == TOP && !precedes(one, &top->best[TOP - 1]))
        return;
    int at = top->count < TOP ? top->count++ : TOP - 1;
    for (; at > 0 && precedes(one, &top->best[at - 1]); at--)
        top->best[at] = top->best[at - 1];
    top->best[at] = *one;
}

static void merge(state *into, const state *s) {
    into->zero += s->zero;
    into->negative += s->negative;
    into->nan += s->nan;
    into->inf += s->inf;
    into->sampled_zero += s->sampled_zero;
    into->compared += s->compared;
    into->moving += s->moving;
    into->flipped += s->flipped;
    into->weight_nonfinite += s->weight_nonfinite;
    into->sum += s->sum;
    into->abs_sum += s->abs_sum;
    into->square_sum += s->square_sum;
    into->weight_square_sum += s->weight_square_sum;
    into->dot += s->dot;
    into->flip_dot += s->flip_dot;
    into->flip_square_sum += s->flip_square_sum;
    into->flip_previous_square_sum += s->flip_previous_square_sum;
    into->low = lesser(into->low, s->low);
    into->abs_min = lesser(into->abs_min, s->abs_min);
    into->high = greater(into->high, s->high);
    into->abs_max = greater(into->abs_max, s->abs_max);
    into->weight_abs_max = greater(into->weight_abs_max, s->weight_abs_max);
    for (int i = 0; i < UPDATES; i++)
        into->update[i] += s->update[i];
    for (int i = 0; i < s->top.count; i++)
        insert(&into->top, &s->top.best[i]);
    for (int key = 0; key < KEYS; key++)
        into->keys[key] += s->keys[key];
}

/* --- the fast way: float, all finite ---------------------------------------------------------------------------------------- */

INLINE int64_t is_finite(double x) { return fabs(x) <= DBL_MAX; }

/* A byte an entry, for finite floats: how far its exponent lies below the block's largest one, at most FAR, and its sign. The
 * bytes are counted level by level, 32 at once, until few entries are left: gradients spread over some ten levels. To count each
 * entry in a table takes four times as long, for an entry mostly waits for the counter of the one before. Zeros and subnormal
 * numbers are as far down as can be. */
enum { FAR = 126, SIGN = 128, LEVELS = 32, LANES = 32, REST = 16 };

#if defined(__GNUC__)
typedef uint8_t lanes __attribute__((vector_size(LANES)));
typedef uint64_t words __attribute__((vector_size(LANES)));
#define COUNT_LEVEL(positive, negative, codes, n, level)                                                                          \
    do {                                                                                                                          \
        lanes up_ = {0}, down_ = {0}, plus_ = up_ + (uint8_t)(level), minus_ = up_ + (uint8_t)((level) | SIGN);                   \
        for (int i_ = 0; i_ < (n); i_ += LANES) {                                                                                 \
            lanes here_ = *(const lanes *)((codes) + i_);                                                                         \
            up_ -= (lanes)(here_ == plus_);                                                                                       \
            down_ -= (lanes)(here_ == minus_);                                                                                    \
        }                                                                                                                         \
        words a_ = ((words)up_ & 0x00ff00ff00ff00ffull) + ((words)up_ >> 8 & 0x00ff00ff00ff00ffull);                              \
        words b_ = ((words)down_ & 0x00ff00ff00ff00ffull) + ((words)down_ >> 8 & 0x00ff00ff00ff00ffull);                          \
        positive = (int)((a_[0] + a_[1] + a_[2] + a_[3]) * 0x0001000100010001ull >> 48);                                          \
        negative = (int)((b_[0] + b_[1] + b_[2] + b_[3]) * 0x0001000100010001ull >> 48);                                          \
    } while (0)
#define ALIGNED __attribute__((aligned(LANES)))
#else
#define COUNT_LEVEL(positive, negative, codes, n, level)                                                                          \
    do {                                                                                                                          \
        positive = negative = 0;                                                                                                  \
        for (int i_ = 0; i_ < (n); i_++) {                                                                                        \
            positive += (codes)[i_] == (level);                                                                                   \
            negative += (codes)[i_] == ((level) | SIGN);                                                                          \
        }                                                                                                                         \
    } while (0)
#define ALIGNED
#endif

/* Counts the keys of a block of finite floats, `zero` of which are 0; `above` is its largest magnitude. A function for each kind
 * of processor and no inline one: GCC takes vectors apart before it looks where a function is used. */
#define COUNT_FLOATS(name, attributes)                                                                                            \
    attributes static void count_floats_##name(uint64_t *keys, const float *g, int n, int zero, float above) {                    \
        uint8_t codes[BLOCK + LANES] ALIGNED;                                                                                     \
        int top = (int)(bits_of(above) >> 23), left = n - zero, level = 0;                                                        \
        if (!left || n > BLOCK || n < 0)                                                                                          \
            return;                                                                                                               \
        for (int i = 0; i < n; i++) {                                                                                             \
            uint16_t half = (uint16_t)(bits_of(g[i]) >> 16), distance = (uint16_t)(top - (half >> 7 & 255));                      \
            distance = distance < FAR ? distance : FAR;                                                                           \
            codes[i] = (uint8_t)(distance | (half >> 8 & SIGN));                                                                  \
        }                                                                                                                         \
        memset(codes + n, FAR, LANES);                                                                                            \
        for (; left > REST && level < LEVELS && level < top; level++) {                                                           \
            int positive, negative;                                                                                               \
            COUNT_LEVEL(positive, negative, codes, n, level);                                                                     \
            keys[top - level] += (uint64_t)positive;                                                                              \
            keys[NEGATIVE_KEYS + top - level] += (uint64_t)negative;                                                              \
            left -= positive + negative;                                                                                          \
        }                                                                                                                         \
        const uint64_t each = 0x0101010101010101ull, high = 128 * each;                                                           \
        for (int i = 0; left && i < n; i += 8) {                                                                                  \
            uint64_t eight;                                                                                                       \
            memcpy(&eight, codes + i, 8);                                                                                         \
            if (!(((eight & ~high) + (uint64_t)(128 - level) * each) & high))                                                     \
                continue; /* none lies so far below */                                                                            \
            for (int k = i; k < i + 8 && k < n; k++)                                                                              \
                if ((codes[k] & ~SIGN) >= level && bits_of(g[k]) << 1) {                                                          \
                    keys[bits_of(g[k]) >> 23]++;                                                                                  \
                    left--;                                                                                                       \
                }                                                                                                                 \
        }                                                                                                                         \
    }

COUNT_FLOATS(plain, )
#ifdef HAVE_VARIANTS
COUNT_FLOATS(avx2, __attribute__((target("avx2,fma,bmi,bmi2"))))
#else
#define count_floats_avx2 count_floats_plain
#endif

INLINE void count_floats(uint64_t *keys, const float *g, int n, int zero, float above, const int has_fma) {
    if (has_fma)
        count_floats_avx2(keys, g, n, zero, above);
    else
        count_floats_plain(keys, g, n, zero, above);
}

INLINE uint16_t key_of(double x) {
    uint64_t bits = bits_of_double(x);
    int64_t exponent = (int64_t)(bits >> 52 & 0x7ff), key = exponent - (1023 - BIAS);
    key = key < 0 ? 0 : key > NOT_FINITE - 1 ? NOT_FINITE - 1 : key;
    key = exponent == 0x7ff ? NOT_FINITE : key;
    return (uint16_t)(key + (bits >> 63 ? NEGATIVE_KEYS : 0));
}

INLINE void count_doubles(uint64_t *keys, const double *x, int n) {
    for (int i = 0; i < n; i++)
        if (x[i] != 0)
            keys[key_of(x[i])]++;
}

/* Counts the entries of the sample that wait. */
INLINE void count_chosen(state *s, const int has_fma) {
    uint32_t above = 0, zero = 0;
    for (int i = 0; i < s->waiting; i++) {
        uint32_t a = bits_of(s->chosen[i]) & 0x7fffffffu;
        above = a > above ? a : above;
        zero += a == 0;
    }
    count_floats(s->keys, s->chosen, s->waiting, (int)zero, from_bits(above), has_fma);
    s->sampled_zero += zero;
    s->waiting = 0;
}

/* The keys of the lines of the sample that lie in a block, which begins with entry `start`; `g` or `x` has its entries.
 * A stratum's line is any of its lines by a number that looks random, so that no pattern of the tensor goes with it. */
INLINE void count_lines(state *s, const float *g, const double *x, int64_t start, int n, const int has_fma) {
    const int64_t first = start / LINE, stride = s->stride;
    const int lines = (n + LINE - 1) / LINE;
    int64_t stratum = first / stride;
    for (int64_t begins = stratum * stride; begins < first + lines; stratum++, begins += stride) {
        int64_t line = begins + ((uint32_t)stratum * 2654435761u >> 8) % (uint64_t)stride - first;
        if (line < 0 || line >= lines)
            continue;
        int from = (int)line * LINE, count = from + LINE < n ? LINE : n - from;
        if (x) {
            for (int i = from; i < from + count; i++)
                s->sampled_zero += x[i] == 0;
            count_doubles(s->keys, x + from, count);
            continue;
        }
        if (s->waiting + count > BLOCK)
            count_chosen(s, has_fma);
        memcpy(s->chosen + s->waiting, g + from, sizeof *g * (size_t)count);
        s->waiting += count;
    }
}

/* a * b + c; with one instruction where there is one, and the same where the product of two floats is exact anyway. */
INLINE double fused(double a, double b, double c, const int has_fma) { return has_fma ? fma(a, b, c) : a * b + c; }

/* Sums of a block, in two loops: the registers do not hold more. They are finite if and only if every entry is, for squares of
 * floats do not overflow. */
typedef struct {
    double sum, abs_sum, square_sum, w_square, dot, p_square, p_dot;
    uint32_t still, flipped; /* entries where one of both gradients is 0, or signs differ */
} sums;

INLINE void add_fast(sums *t, const float *g, const float *w, int n, const int has_w, const int has_fma) {
    double sum = 0, abs_sum = 0, square_sum = 0, w_square = 0, dot = 0;
#pragma omp simd reduction(+ : sum, abs_sum, square_sum, w_square, dot)
    for (int i = 0; i < n; i++) {
        double x = g[i];
        sum += x;
        abs_sum += fabs(x);
        square_sum = fused(x, x, square_sum, has_fma);
        if (has_w) {
            double y = w[i];
            w_square = fused(y, y, w_square, has_fma);
            dot = fused(x, y, dot, has_fma);
        }
    }
    t->sum = sum, t->abs_sum = abs_sum, t->square_sum = square_sum, t->w_square = w_square, t->dot = dot;
}

INLINE void add_previous(sums *t, const float *g, const float *p, int n, const int has_fma) {
    double p_square = 0, p_dot = 0;
    uint32_t still = 0, flipped = 0;
#pragma omp simd reduction(+ : p_square, p_dot, still, flipped)
    for (int i = 0; i < n; i++) {
        double x = g[i], z = p[i];
        uint32_t a = bits_of(g[i]), b = bits_of(p[i]), least = a << 1 < b << 1 ? a << 1 : b << 1;
        p_square = fused(z, z, p_square, has_fma);
        p_dot = fused(x, z, p_dot, has_fma);
        still += least == 0;
        flipped += least == 0 ? 0 : (a ^ b) >> 31;
    }
    t->p_square = p_square, t->p_dot = p_dot, t->still = still, t->flipped = flipped;
}

INLINE uint32_t largest_bits(const float *x, int n) {
    uint32_t top = 0;
#pragma omp simd reduction(max : top)
    for (int i = 0; i < n; i++) {
        uint32_t a = bits_of(x[i]) & 0x7fffffffu;
        top = a > top ? a : top;
    }
    return top;
}

/* Whether the block was all finite and is done; `*above` is then its largest magnitude, `*zeros` how many are 0. */
INLINE int fast(state *s, const float *g, const float *w, const float *p, int n, double *above, int *zeros,
                const int has_fma) {
    uint32_t below = UINT32_MAX, zero = 0, negative = 0;
    float low = INFINITY, high = -INFINITY;
#pragma omp simd reduction(max : high) reduction(min : below, low) reduction(+ : zero, negative)
    for (int i = 0; i < n; i++) {
        uint32_t a = bits_of(g[i]) & 0x7fffffffu;
        below = a - 1 < below ? a - 1 : below; /* a zero becomes the largest */
        zero += a == 0;
        negative += g[i] < 0;
        low = g[i] < low ? g[i] : low;
        high = g[i] > high ? g[i] : high;
    }
    sums t = {0};
    if (w)
        add_fast(&t, g, w, n, 1, has_fma);
    else
        add_fast(&t, g, w, n, 0, has_fma);
    if (p)
        add_previous(&t, g, p, n, has_fma);
    if (!is_finite(t.square_sum) || !is_finite(t.w_square) || !is_finite(t.p_square))
        return 0;
    s->sum += t.sum;
    s->abs_sum += t.abs_sum;
    s->square_sum += t.square_sum;
    s->zero += zero;
    s->negative += negative;
    s->low = lesser(s->low, low);
    s->high = greater(s->high, high);
    *zeros = (int)zero;
    *above = greater(high, -low);
    s->abs_max = greater(s->abs_max, *above);
    if (below < UINT32_MAX)
        s->abs_min = lesser(s->abs_min, from_bits(below + 1));
    if (w) {
        s->weight_square_sum += t.w_square;
        s->weight_abs_max = greater(s->weight_abs_max, from_bits(largest_bits(w, n)));
        s->dot += t.dot;
    }
    if (p) {
        s->compared += n;
        s->moving += n - (int64_t)t.still;
        s->flipped += t.flipped;
        s->flip_dot += t.p_dot;
        s->flip_square_sum += t.square_sum;
        s->flip_previous_square_sum += t.p_square;
    }
    return 1;
}

/* --- the careful way: each entry is asked whether it is finite ---------------------------------------------------------------- */

INLINE void careful(state *s, const double *g, const double *w, const double *p, int n, double *above) {
    double sum = 0, abs_sum = 0, square_sum = 0, low = INFINITY, high = -INFINITY, top = -INFINITY, least = INFINITY;
    int64_t zero = 0, negative = 0, nan = 0, odd = 0;
#pragma omp simd reduction(+ : sum, abs_sum, square_sum, zero, negative, nan, odd) reduction(max : high, top) reduction(min : low, least)
    for (int i = 0; i < n; i++) {
        int64_t fine = is_finite(g[i]);
        double x = fine ? g[i] : 0, a = fabs(x), from = fine ? x : INFINITY, to = fine ? x : -INFINITY;
        double size = fine ? a : -INFINITY, moved = a > 0 ? a : INFINITY;
        sum += x;
        abs_sum += a;
        square_sum += x * x;
        low = from < low ? from : low;
        high = to > high ? to : high;
        top = size > top ? size : top;
        least = moved < least ? moved : least;
        zero += g[i] == 0;
        negative += x < 0;
        nan += g[i] != g[i];
        odd += !fine;
    }
    s->sum += sum;
    s->abs_sum += abs_sum;
    s->square_sum += square_sum;
    s->zero += zero;
    s->negative += negative;
    s->nan += nan;
    s->inf += odd - nan;
    s->low = lesser(s->low, low);
    s->high = greater(s->high, high);
    s->abs_max = greater(s->abs_max, top);
    s->abs_min = lesser(s->abs_min, least);
    *above = top;
    if (w) {
        double w_square = 0, dot = 0, w_top = -INFINITY;
        int64_t nonfinite = 0;
#pragma omp simd reduction(+ : w_square, dot, nonfinite) reduction(max : w_top)
        for (int i = 0; i < n; i++) {
            int64_t fine = is_finite(w[i]);
            double x = is_finite(g[i]) ? g[i] : 0, y = fine ? w[i] : 0, size = fine ? fabs(y) : -INFINITY;
            w_square += y * y;
            dot += x * y;
            w_top = size > w_top ? size : w_top;
            nonfinite += !fine;
        }
        s->weight_square_sum += w_square;
        s->dot += dot;
        s->weight_abs_max = greater(s->weight_abs_max, w_top);
        s->weight_nonfinite += nonfinite;
    }
    if (p) {
        double p_dot = 0, x_square = 0, p_square = 0;
        int64_t compared = 0, moving = 0, flipped = 0;
#pragma omp simd reduction(+ : p_dot, x_square, p_square, compared, moving, flipped)
        for (int i = 0; i < n; i++) {
            int64_t both = is_finite(g[i]) & is_finite(p[i]);
            double x = both ? g[i] : 0, z = both ? p[i] : 0;
            int64_t moved = (x != 0) & (z != 0);
            compared += both;
            moving += moved;
            flipped += moved & ((x < 0) != (z < 0));
            p_dot += x * z;
            x_square += x * x;
            p_square += z * z;
        }
        s->compared += compared;
        s->moving += moving;
        s->flipped += flipped;
        s->flip_dot += p_dot;
        s->flip_square_sum += x_square;
        s->flip_previous_square_sum += p_square;
    }
}

/* --- summarize ---------------------------------------------------------------------------------------------------------------- */

/* All operands share one permuted but gapless layout: then memory order serves everything but the indices. */
typedef struct {
    int axes;
    int64_t length[AXES], memory[AXES], logical[AXES]; /* strides in entries, by falling memory stride */
} order;

static int shared_order(const task *t, const int64_t *layouts, order *o) {
    const int64_t *layout = layouts + t->layout;
    int axes = (int)layout[0];
    const int64_t *length = layout + 1, *stride = length + axes;
    int64_t logical = 1;
    o->axes = 0;
    for (int axis = axes - 1; axis >= 0; axis--) {
        if (length[axis] == 1)
            continue;
        for (int operand = 1; operand < OPERANDS; operand++)
            if (t->pointer[operand] && stride[axes * operand + axis] != stride[axis])
                return 0;
        int at = o->axes++;
        for (; at > 0 && o->memory[at - 1] < stride[axis]; at--) {
            o->length[at] = o->length[at - 1];
            o->memory[at] = o->memory[at - 1];
            o->logical[at] = o->logical[at - 1];
        }
        o->length[at] = length[axis];
        o->memory[at] = stride[axis];
        o->logical[at] = logical;
        logical *= length[axis];
    }
    int64_t expected = 1;
    for (int at = o->axes - 1; at >= 0; at--) {
        if (o->memory[at] != expected)
            return 0;
        expected *= o->length[at];
    }
    return 1;
}

static int64_t logical_index(const order *o, int64_t memory) {
    int64_t index = 0;
    for (int at = 0; at < o->axes; at++) {
        index += memory / o->memory[at] * o->logical[at];
        memory %= o->memory[at];
    }
    return index;
}

/* A lower bound of the logical index of all entries at and after this place in memory. */
static int64_t least_index(const order *o, int64_t memory) { return o->axes ? memory / o->memory[0] * o->logical[0] : 0; }

/* Whether a block can have an entry that is among the largest; `above` is its largest magnitude. */
static int may_belong(const largest *top, double above, int64_t start, const order *o) {
    const entry *last = &top->best[TOP - 1];
    if (top->count < TOP || above > last->magnitude)
        return 1;
    return o && above == last->magnitude && least_index(o, start) < last->index;
}

enum { RUN = 32, MANY = 3 * TOP };

/* The block's entries that are among the largest. `o` is NULL where memory order is logical order.
 *
 * Entries that reach the bar are marked by a loop without branches, then visited. While there are fewer than TOP, or where MANY
 * reach the bar, as when magnitudes rise, it is raised first: at least TOP of RUN lanes' peaks are as large as the TOPth largest
 * of them. The first ones are not inserted but ranked: a loop counts how many are larger. */
#define FIND(name, real, magnitude_of, finite)                                                                                    \
    INLINE real name##_bar(const real *g, int n) {                                                                                \
        real lane[RUN], bar = INFINITY;                                                                                           \
        for (int j = 0; j < RUN; j++)                                                                                             \
            lane[j] = -1;                                                                                                         \
        for (int i = 0; i + RUN <= n; i += RUN)                                                                                   \
            for (int j = 0; j < RUN; j++) {                                                                                       \
                real a = magnitude_of(g[i + j]);                                                                                  \
                a = a <= finite ? a : -1;                                                                                         \
                lane[j] = a > lane[j] ? a : lane[j];                                                                              \
            }                                                                                                                     \
        int32_t larger[RUN] = {0};                                                                                                \
        for (int i = 0; i < RUN; i++)                                                                                             \
            for (int j = 0; j < RUN; j++)                                                                                         \
                larger[j] += lane[i] > lane[j];                                                                                   \
        for (int j = 0; j < RUN; j++)                                                                                             \
            bar = larger[j] < TOP && lane[j] < bar ? lane[j] : bar;                                                               \
        return bar;                                                                                                               \
    }                                                                                                                             \
                                                                                                                                  \
    INLINE entry name##_entry(const real *g, const real *w, int i, int64_t index) {                                               \
        return (entry){magnitude_of(g[i]), (double)g[i] + 0.0, w ? (double)w[i] : NAN, index};                                    \
    }                                                                                                                             \
                                                                                                                                  \
    /* The places of what reaches the bar; returns how many, or `most` + 1 where there are more. */                               \
    INLINE int name##_places(uint16_t *at, const real *g, int n, real bar, int most) {                                            \
        uint8_t marks[BLOCK + 8];                                                                                                 \
        int count = 0;                                                                                                            \
        for (int i = 0; i < n; i++)                                                                                               \
            marks[i] = (magnitude_of(g[i]) >= bar) & (magnitude_of(g[i]) <= finite);                                              \
        memset(marks + n, 0, 8);                                                                                                  \
        for (int i = 0; i < n; i += 8) {                                                                                          \
            uint64_t eight;                                                                                                       \
            memcpy(&eight, marks + i, 8);                                                                                         \
            if (!eight)                                                                                                           \
                continue;                                                                                                         \
            for (int j = i; j < i + 8; j++) {                                                                                     \
                at[count] = (uint16_t)j;                                                                                          \
                count += marks[j];                                                                                                \
            }                                                                                                                     \
            if (count > most)                                                                                                     \
                return most + 1;                                                                                                  \
        }                                                                                                                         \
        return count;                                                                                                             \
    }                                                                                                                             \
                                                                                                                                  \
    INLINE void name##_first(largest *top, const real *g, const real *w, int64_t start, const uint16_t *at, int count) {          \
        real lane[RUN];                                                                                                           \
        uint16_t ranked[RUN];                                                                                                     \
        for (int j = 0; j < RUN; j++)                                                                                             \
            lane[j] = j < count ? magnitude_of(g[at[j]]) : -1;                                                                    \
        int32_t rank[RUN] = {0}, sum = 0;                                                                                         \
        for (int i = 0; i < count; i++)                                                                                           \
            for (int j = 0; j < RUN; j++)                                                                                         \
                rank[j] += lane[i] > lane[j];                                                                                     \
        for (int j = 0; j < count; j++)                                                                                           \
            sum += rank[j];                                                                                                       \
        if (sum != count * (count - 1) / 2) /* some are equal */                                                                  \
            for (int j = 0; j < count; j++)                                                                                       \
                for (int i = 0; i < j; i++)                                                                                       \
                    rank[j] += lane[i] == lane[j];                                                                                \
        for (int j = 0; j < count; j++)                                                                                           \
            ranked[rank[j]] = at[j];                                                                                              \
        for (; top->count < TOP && top->count < count; top->count++)                                                              \
            top->best[top->count] = name##_entry(g, w, ranked[top->count], start + ranked[top->count]);                           \
    }                                                                                                                             \
                                                                                                                                  \
    INLINE void name(largest *top, const real *g, const real *w, int n, int64_t start, const order *o) {                          \
        real bar = top->count < TOP ? 0 : (real)top->best[TOP - 1].magnitude;                                                     \
        uint16_t at[BLOCK + 8];                                                                                                   \
        int count = top->count < TOP && n > RUN ? MANY + 1 : name##_places(at, g, n, bar, n > RUN ? MANY : n);                    \
        if (count > MANY && n > RUN) {                                                                                            \
            real higher = name##_bar(g, n);                                                                                       \
            count = name##_places(at, g, n, higher > bar ? higher : bar, n);                                                      \
        }                                                                                                                         \
        if (top->count == 0 && !o && count <= RUN) {                                                                              \
            name##_first(top, g, w, start, at, count);                                                                            \
            return;                                                                                                               \
        }                                                                                                                         \
        for (int i = 0; i < count; i++) {                                                                                         \
            entry one = name##_entry(g, w, at[i], o ? logical_index(o, start + at[i]) : start + at[i]);                           \
            insert(top, &one);                                                                                                    \
        }                                                                                                                         \
    }
FIND(find_float, float, fabsf, FLT_MAX)
FIND(find_double, double, fabs, DBL_MAX)

/* The place of the k-th of a tensor's samples. */
INLINE int64_t sample_place(int64_t count, int k) { return count > SAMPLES ? k * (count - 1) / (SAMPLES - 1) : k; }

/* The samples of G and of W that lie in a block, from `*next` on. */
static void take_samples(double *samples, int *next, const task *t, const void *const *lines, int64_t start, int n) {
    for (; *next < SAMPLES && *next < t->count && sample_place(t->count, *next) < start + n; ++*next) {
        int64_t at = sample_place(t->count, *next) - start;
        for (int operand = G; operand <= W; operand++) {
            int type = (int)t->type[operand];
            float between;
            double value;
            samples[operand * SAMPLES + *next] =
                *wide((const char *)lines[operand] + at * SIZE[type], type, 1, &between, &value);
        }
    }
}

INLINE void store(const walk *w, int64_t at, int n, const void *line) {
    if (w->axes)
        move(w, at, n, (char *)(intptr_t)line, 1);
    else
        memmove(w->base + at * w->size, line, (size_t)n * (size_t)w->size);
}

/* Entries [start, stop) of a tensor. `samples` has room for those of G and W, or is NULL. */
INLINE void summarize_piece(const task *t, const int64_t *layouts, int64_t start, int64_t stop, state *s, room *r,
                           double *samples, const int has_fma) {
    order shared, *o = NULL;
    task straight = *t;
    if (t->layout > 0 && shared_order(t, layouts, &shared)) {
        o = &shared;
        straight.layout = 0;
    }
    walk walks[OPERANDS];
    int is_wide = 0;
    for (int operand = 0; operand < OPERANDS; operand++)
        if (t->pointer[operand]) {
            walks[operand] = walk_of(&straight, layouts, operand);
            is_wide |= walks[operand].type == FLOAT64;
        }
    int next = 0;
    if (samples && t->count < SAMPLES) /* of longer ones each place is filled, some of them by another thread */
        memset(samples, 0, sizeof *samples * 2 * SAMPLES);
    while (samples && next < SAMPLES && sample_place(t->count, next) < start)
        next++;
    for (int64_t at = start; at < stop; at += BLOCK) {
        int n = (int)(stop - at < BLOCK ? stop - at : BLOCK);
        const void *lines[3] = {NULL, NULL, NULL};
        for (int operand = 0; operand < 3; operand++)
            if (t->pointer[operand])
                lines[operand] = line_of(&walks[operand], at, n, r->raw[operand]);
        if (samples)
            take_samples(samples, &next, t, lines, at, n);
        const float *x[3] = {NULL, NULL, NULL};
        double above = 0;
        int done = 0, zeros = 0;
        if (!is_wide) {
            for (int operand = 0; operand < 3; operand++)
                if (lines[operand])
                    x[operand] = narrow(lines[operand], walks[operand].type, n, r->narrow[operand]);
            done = fast(s, x[G], x[W], x[PREVIOUS], n, &above, &zeros, has_fma);
        }
        const double *y[3] = {NULL, NULL, NULL};
        if (!done) {
            for (int operand = 0; operand < 3; operand++)
                if (lines[operand])
                    y[operand] = wide(lines[operand], walks[operand].type, n, r->narrow[operand], r->wide[operand]);
            careful(s, y[G], y[W], y[PREVIOUS], n, &above);
        }
        if (s->stride)
            count_lines(s, x[G], done ? NULL : y[G], at, n, has_fma);
        else if (done)
            count_floats(s->keys, x[G], n, zeros, (float)above, has_fma);
        else
            count_doubles(s->keys, y[G], n);
        if (may_belong(&s->top, above, at, o)) {
            if (done)
                find_float(&s->top, x[G], x[W], n, at, o);
            else
                find_double(&s->top, y[G], y[W], n, at, o);
        }
        if (t->pointer[KEEP])
            store(&walks[KEEP], at, n, lines[G]);
        if (t->pointer[COPY])
            store(&walks[COPY], at, n, lines[W]);
    }
    count_chosen(s, has_fma);
}

static double or_nothing(double extreme) { return extreme > -INFINITY && extreme < INFINITY ? extreme + 0.0 : NAN; }

/* Keys beyond the outermost buckets go into them. */
enum { FIRST = EXPONENT_MIN + BIAS, LAST = EXPONENT_MAX + BIAS };

/* Counts by bucket: `of[0]` the negative ones, `of[1]` the positive. Those in [low, high] are set, all others are 0. */
typedef struct {
    int low, high;
    int64_t of[2][BUCKETS];
} buckets;

INLINE int bucket_of(int key) { return key < FIRST ? 0 : key > LAST ? BUCKETS - 1 : key - FIRST; }

/* Only keys between those of the least and the largest magnitude have been met. */
static void collect(const state *s, buckets *b) {
    b->low = 0, b->high = -1;
    if (!(s->abs_min < INFINITY))
        return;
    int least = key_of(s->abs_min), most = key_of(s->abs_max);
    b->low = bucket_of(least), b->high = bucket_of(most);
    for (int sign = 0; sign < 2; sign++)
        memset(b->of[sign] + b->low, 0, sizeof **b->of * (size_t)(b->high - b->low + 1));
    for (int key = least; key <= most; key++) {
        b->of[0][bucket_of(key)] += (int64_t)s->keys[key + NEGATIVE_KEYS];
        b->of[1][bucket_of(key)] += (int64_t)s->keys[key];
    }
}

/* As `fields.quantiles`: exact in rank, interpolated within the bucket. */
static void write_quantiles(double *row, const buckets *b, int64_t zero, double least, double most) {
    int64_t total = zero, passed = 0, inside = 0;
    for (int bucket = b->low; bucket <= b->high; bucket++)
        total += b->of[0][bucket] + b->of[1][bucket];
    int width = b->high - b->low + 1, at = -1; /* of 2 * width + 1 buckets by rising value, zero in the middle */
    for (int k = 0; k < QUANTILES; k++) {
        if (!total) {
            row[k] = NAN;
            continue;
        }
        int64_t rank = (int64_t)floor(QUANTILE[k] * (double)(total - 1));
        while (at < 0 || passed + inside <= rank) {
            passed += inside;
            at++;
            inside = at < width ? b->of[0][b->high - at] : at == width ? zero : b->of[1][b->low + at - width - 1];
        }
        double from = 0, to = 0;
        if (at < width)
            from = -ldexp(1, b->high - at + EXPONENT_MIN + 1), to = from / 2;
        else if (at > width)
            from = ldexp(1, b->low + at - width - 1 + EXPONENT_MIN), to = 2 * from;
        double share = ((double)(rank - passed) + 0.5) / (double)inside, value = from + share * (to - from);
        value = value < least ? least : value;
        row[k] = value > most ? most : value;
    }
}

static void write_summary(const task *t, state *s, double *row, int detail) {
    buckets b;
    collect(s, &b);
    write_quantiles(row + QUANTILE_, &b, s->stride ? s->sampled_zero : s->zero, s->low + 0.0, s->high + 0.0);
    if (detail) {
        memset(row + HISTOGRAM, 0, sizeof *row * 2 * BUCKETS);
        for (int sign = 0; sign < 2; sign++)
            for (int bucket = b.low; bucket <= b.high; bucket++)
                row[HISTOGRAM + sign * BUCKETS + bucket] = (double)b.of[sign][bucket];
    }
    row[NUMEL] = (double)t->count;
    row[POSITIVE] = (double)(t->count - s->nan - s->inf - s->zero - s->negative);
    row[NEGATIVE] = (double)s->negative;
    row[INF] = (double)s->inf;
    row[ZERO] = (double)s->zero;
    row[NAN_] = (double)s->nan;
    row[SUM] = s->sum;
    row[ABS_SUM] = s->abs_sum;
    row[SQUARE_SUM] = s->square_sum;
    row[MIN] = or_nothing(s->low);
    row[MAX] = or_nothing(s->high);
    row[ABS_MAX] = or_nothing(s->abs_max);
    row[ABS_MIN_NONZERO] = or_nothing(s->abs_min);
    row[WEIGHT_SQUARE_SUM] = t->pointer[W] ? s->weight_square_sum : NAN;
    row[WEIGHT_ABS_MAX] = t->pointer[W] ? or_nothing(s->weight_abs_max) : NAN;
    row[DOT] = t->pointer[W] ? s->dot : NAN;
    row[WEIGHT_NONFINITE] = (double)s->weight_nonfinite;
    row[FLIP_COMPARED] = (double)s->compared;
    row[FLIP_MOVING] = (double)s->moving;
    row[FLIP_COUNT] = (double)s->flipped;
    row[FLIP_DOT] = t->pointer[PREVIOUS] ? s->flip_dot : NAN;
    row[FLIP_SQUARE_SUM] = t->pointer[PREVIOUS] ? s->flip_square_sum : NAN;
    row[FLIP_PREVIOUS_SQUARE_SUM] = t->pointer[PREVIOUS] ? s->flip_previous_square_sum : NAN;
    for (int i = 0; i < TOP; i++) {
        entry one = {-1, NAN, NAN, -1};
        if (i < s->top.count)
            one = s->top.best[i];
        row[TOP_PARTIAL + i] = one.partial;
        row[TOP_INDEX + i] = (double)one.index;
        row[TOP_VALUE + i] = one.value;
    }
}

/* --- compare ------------------------------------------------------------------------------------------------------------------ */

/* Whether the sums of a block are finite, as where all of its entries are. */
INLINE int add_moves(double *u, const float *used, const float *before, const float *after, const float *loss, int n,
                     const int has_used, const int has_loss, const int has_fma) {
    double squares = 0, before_squares = 0, used_squares = 0, dot = 0, loss_dot = 0;
#pragma omp simd reduction(+ : squares, before_squares, used_squares, dot, loss_dot)
    for (int i = 0; i < n; i++) {
        double w = before[i], dw = (double)after[i] - w;
        squares = fused(dw, dw, squares, has_fma);
        before_squares = fused(w, w, before_squares, has_fma);
        if (has_used) {
            double g = used[i];
            used_squares = fused(g, g, used_squares, has_fma);
            dot = fused(g, dw, dot, has_fma);
        }
        if (has_loss)
            loss_dot = fused(loss[i], dw, loss_dot, has_fma);
    }
    if (!is_finite(squares) || !is_finite(used_squares) || !is_finite(loss_dot))
        return 0;
    u[UPDATE_SQUARE_SUM] += squares;
    u[UPDATE_BEFORE_SQUARE_SUM] += before_squares;
    u[UPDATE_USED_SQUARE_SUM] += used_squares;
    u[UPDATE_DOT] += dot;
    u[UPDATE_LOSS_DOT] += loss_dot;
    return 1;
}

/* Whether the block was all finite and is done. */
INLINE int compare_fast(double *u, const float *used, const float *before, const float *after, const float *loss, int n,
                        const int has_fma) {
    int done = used && loss ? add_moves(u, used, before, after, loss, n, 1, 1, has_fma)
               : used       ? add_moves(u, used, before, after, loss, n, 1, 0, has_fma)
                            : add_moves(u, used, before, after, loss, n, 0, loss != NULL, has_fma);
    if (!done || !used)
        return done;
    uint32_t moving = 0, against = 0, stuck = 0;
#pragma omp simd reduction(+ : moving, against, stuck)
    for (int i = 0; i < n; i++) {
        uint32_t asked = used[i] != 0, moved = after[i] != before[i];
        moving += asked & moved;
        against += asked & moved & ((used[i] > 0) == (after[i] > before[i]));
        stuck += asked & !moved;
    }
    u[UPDATE_MOVING] += moving;
    u[UPDATE_AGAINST] += against;
    u[UPDATE_STUCK] += stuck;
    return 1;
}

INLINE void compare_careful(double *u, const double *used, const double *before, const double *after, const double *loss, int n) {
    double squares = 0, before_squares = 0;
    int64_t nonfinite = 0;
#pragma omp simd reduction(+ : squares, before_squares, nonfinite)
    for (int i = 0; i < n; i++) {
        double dw = after[i] - before[i];
        int64_t fine = is_finite(dw);
        nonfinite += !is_finite(after[i]);
        double d = fine ? dw : 0, b = fine ? before[i] : 0;
        squares += d * d;
        before_squares += b * b;
    }
    u[UPDATE_SQUARE_SUM] += squares;
    u[UPDATE_BEFORE_SQUARE_SUM] += before_squares;
    u[UPDATE_NONFINITE] += (double)nonfinite;
    if (used) {
        double used_squares = 0, dot = 0;
        int64_t moving = 0, against = 0, stuck = 0;
#pragma omp simd reduction(+ : used_squares, dot, moving, against, stuck)
        for (int i = 0; i < n; i++) {
            double dw = after[i] - before[i];
            int64_t fine = is_finite(dw) & is_finite(used[i]);
            double d = fine ? dw : 0, g = fine ? used[i] : 0;
            int64_t asked = g != 0, moved = d != 0;
            used_squares += g * g;
            dot += g * d;
            moving += asked & moved;
            against += asked & moved & ((g > 0) == (d > 0));
            stuck += asked & !moved;
        }
        u[UPDATE_USED_SQUARE_SUM] += used_squares;
        u[UPDATE_DOT] += dot;
        u[UPDATE_MOVING] += (double)moving;
        u[UPDATE_AGAINST] += (double)against;
        u[UPDATE_STUCK] += (double)stuck;
    }
    if (loss) {
        double dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int i = 0; i < n; i++) {
            double dw = after[i] - before[i];
            int64_t fine = is_finite(dw) & is_finite(loss[i]);
            double d = fine ? dw : 0, g = fine ? loss[i] : 0;
            dot += g * d;
        }
        u[UPDATE_LOSS_DOT] += dot;
    }
}

INLINE void compare_piece(const task *t, const int64_t *layouts, int64_t start, int64_t stop, state *s, room *r, const int has_fma) {
    walk walks[OPERANDS];
    int is_wide = 0;
    for (int operand = 0; operand < OPERANDS; operand++)
        if (t->pointer[operand]) {
            walks[operand] = walk_of(t, layouts, operand);
            is_wide |= walks[operand].type == FLOAT64;
        }
    for (int64_t at = start; at < stop; at += BLOCK) {
        int n = (int)(stop - at < BLOCK ? stop - at : BLOCK);
        const void *lines[OPERANDS] = {NULL, NULL, NULL, NULL};
        const float *x[OPERANDS] = {NULL, NULL, NULL, NULL};
        const double *y[OPERANDS] = {NULL, NULL, NULL, NULL};
        for (int operand = 0; operand < OPERANDS; operand++)
            if (t->pointer[operand])
                lines[operand] = line_of(&walks[operand], at, n, r->raw[operand]);
        if (!is_wide) {
            for (int operand = 0; operand < OPERANDS; operand++)
                if (lines[operand])
                    x[operand] = narrow(lines[operand], walks[operand].type, n, r->narrow[operand]);
            if (compare_fast(s->update, x[USED], x[BEFORE], x[AFTER], x[LOSS], n, has_fma))
                continue;
        }
        for (int operand = 0; operand < OPERANDS; operand++)
            if (lines[operand])
                y[operand] = wide(lines[operand], walks[operand].type, n, r->narrow[operand], r->wide[operand]);
        compare_careful(s->update, y[USED], y[BEFORE], y[AFTER], y[LOSS], n);
    }
}

static void write_update(const task *t, state *s, double *row, int detail) {
    (void)detail;
    memcpy(row, s->update, sizeof s->update);
    row[UPDATE_NUMEL] = (double)t->count;
    if (!t->pointer[USED])
        row[UPDATE_USED_SQUARE_SUM] = row[UPDATE_DOT] = NAN;
    if (!t->pointer[LOSS])
        row[UPDATE_LOSS_DOT] = NAN;
    row[UPDATE_LOSS_EXACT] = t->pointer[LOSS] ? 1 : NAN;
}

/* --- the same code for each kind of processor ----------------------------------------------------------------------------------- */

typedef void (*piece)(const task *, const int64_t *, int64_t, int64_t, state *, room *, double *);

#define VARIANT(name, attributes, has_fma)                                                                                        \
    attributes static void summarize_##name(const task *t, const int64_t *l, int64_t a, int64_t b, state *s, room *r, double *q) { \
        summarize_piece(t, l, a, b, s, r, q, has_fma);                                                                            \
    }                                                                                                                             \
    attributes static void compare_##name(const task *t, const int64_t *l, int64_t a, int64_t b, state *s, room *r, double *q) {  \
        (void)q;                                                                                                                  \
        compare_piece(t, l, a, b, s, r, has_fma);                                                                                 \
    }

VARIANT(plain, , 0)
#ifdef HAVE_VARIANTS
VARIANT(avx2, __attribute__((target("avx2,fma,bmi,bmi2"))), 1)
VARIANT(avx512, __attribute__((target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))), 1)
#endif

static const piece SUMMARIZE[] = {
    summarize_plain,
#ifdef HAVE_VARIANTS
    summarize_avx2,
    summarize_avx512,
#endif
};
static const piece COMPARE[] = {
    compare_plain,
#ifdef HAVE_VARIANTS
    compare_avx2,
    compare_avx512,
#endif
};

/* The best variant that this processor runs: 0 plain (on ARM that is NEON), 1 AVX2, 2 AVX-512. */
EXPORT int gradlens_variant(void) {
#ifdef HAVE_VARIANTS
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
        return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl")
               ? 2
               : 1;
#else
    return 0;
#endif
}

/* --- sharing the work ------------------------------------------------------------------------------------------------------------ */

typedef struct {
    int64_t task, entry;
} cut;

/* One thread's stretch of all entries. A tensor that it shares with others is left as a part, at most one at each end. */
typedef struct {
    const task *tasks;
    const int64_t *layouts;
    double *rows;
    int64_t width;
    piece work;
    void (*write)(const task *, state *, double *, int detail);
    int counts, detail; /* whether keys are counted, and all of them */
    double *samples;    /* 16 of G and 16 of W a task, or NULL */
    cut from, to;
    int parts;
    int64_t part_task[2];
    state part[2];
} job;

/* The lines of a stratum of a tensor's sample; 0 where all entries are counted. */
static int64_t stride_of(const job *j, const task *t) {
    if (!j->counts || j->detail || t->count <= LARGE || walk_of(t, j->layouts, G).axes)
        return 0;
    int64_t lines = (t->count + LINE - 1) / LINE;
    return (lines + STRATA - 1) / STRATA;
}

static void run(job *j) {
    room r;
    state whole;
    j->parts = 0;
    for (int64_t i = j->from.task; i <= j->to.task; i++) {
        int64_t start = i == j->from.task ? j->from.entry : 0;
        if (i == j->to.task && j->to.entry == 0)
            break;
        const task *t = j->tasks + i;
        int64_t stop = i == j->to.task ? j->to.entry : t->count;
        int all = start == 0 && stop == t->count;
        state *s = all ? &whole : &j->part[j->parts];
        begin(s, j->counts, stride_of(j, t));
        j->work(t, j->layouts, start, stop, s, &r, j->samples ? j->samples + i * 2 * SAMPLES : NULL);
        if (all)
            j->write(t, s, j->rows + i * j->width, j->detail);
        else
            j->part_task[j->parts++] = i;
    }
}

/* Subnormal numbers count as what they are, whatever torch.set_flush_denormal says: flags of MXCSR, or of FPCR on ARM. */
typedef unsigned long long mode;

static mode keep_subnormals(void) {
    mode was = 0;
#if defined(HAVE_VARIANTS)
    was = _mm_getcsr();
    _mm_setcsr((unsigned)was & ~0x8040u);
#elif defined(__GNUC__) && defined(__aarch64__)
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(was));
    __asm__ __volatile__("msr fpcr, %0" : : "r"(was & ~(1ull << 24)));
#endif
    return was;
}

static void restore(mode was) {
#if defined(HAVE_VARIANTS)
    _mm_setcsr((unsigned)was);
#elif defined(__GNUC__) && defined(__aarch64__)
    __asm__ __volatile__("msr fpcr, %0" : : "r"(was));
#else
    (void)was;
#endif
}

static void *run_exactly(void *argument) {
    mode was = keep_subnormals();
    run(argument);
    restore(was);
    return NULL;
}

enum { THREADS = 64, STACK = 1 << 20 }; /* a room and a state are 120 kB, nearly all that a thread has under musl */

static void write_parts(job *jobs, int threads) {
    job *owner = NULL; /* whose first or last part collects */
    int at = 0;
    for (int i = 0; i < threads; i++)
        for (int part = 0; part < jobs[i].parts; part++) {
            if (owner && owner->part_task[at] == jobs[i].part_task[part]) {
                merge(&owner->part[at], &jobs[i].part[part]);
                continue;
            }
            if (owner)
                owner->write(owner->tasks + owner->part_task[at], &owner->part[at], owner->rows + owner->part_task[at] * owner->width, owner->detail);
            owner = &jobs[i];
            at = part;
        }
    if (owner)
        owner->write(owner->tasks + owner->part_task[at], &owner->part[at], owner->rows + owner->part_task[at] * owner->width, owner->detail);
}

/* Where each thread begins: entries shared evenly, tensors cut between blocks. */
static void share(const task *tasks, int64_t n, cut *cuts, int threads) {
    int64_t total = 0, passed = 0, i = 0;
    for (int64_t k = 0; k < n; k++)
        total += tasks[k].count;
    cuts[0] = (cut){0, 0};
    for (int k = 1; k < threads; k++) {
        int64_t wanted = total / threads * k;
        while (i < n && passed + tasks[i].count <= wanted)
            passed += tasks[i++].count;
        cuts[k] = (cut){i, i < n ? (wanted - passed) / BLOCK * BLOCK : 0};
    }
    cuts[threads] = (cut){n, 0};
}

static void run_all(const job *model, int64_t n, int threads) {
    job alone, *jobs = &alone;
    cut cuts[THREADS + 1];
    threads = threads < 1 ? 1 : threads > THREADS ? THREADS : threads;
#ifdef HAVE_THREADS
    if (threads > 1 && !(jobs = malloc(sizeof(job) * (size_t)threads)))
        jobs = &alone;
#endif
    if (jobs == &alone)
        threads = 1;
    share(model->tasks, n, cuts, threads);
    for (int k = 0; k < threads; k++) {
        memcpy(&jobs[k], model, offsetof(job, part));
        jobs[k].from = cuts[k];
        jobs[k].to = cuts[k + 1];
    }
#ifdef HAVE_THREADS
    pthread_t handles[THREADS];
    pthread_attr_t roomy;
    int started[THREADS] = {0}, asked = pthread_attr_init(&roomy) == 0 && pthread_attr_setstacksize(&roomy, STACK) == 0;
    for (int k = 1; k < threads; k++)
        started[k] = asked && pthread_create(&handles[k], &roomy, run_exactly, &jobs[k]) == 0;
    run_exactly(&jobs[0]);
    for (int k = 1; k < threads; k++)
        if (started[k])
            pthread_join(handles[k], NULL);
        else
            run_exactly(&jobs[k]);
    if (asked)
        pthread_attr_destroy(&roomy);
#else
    run_exactly(&jobs[0]);
#endif
    write_parts(jobs, threads);
    if (jobs != &alone)
        free(jobs);
}

/* --- what may be overwritten ----------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t first, end, row;
} stretch;

/* The memory between an operand's first entry and the end of its last. */
static stretch stretch_of(const task *t, const int64_t *layouts, int operand, int64_t row) {
    walk w = walk_of(t, layouts, operand);
    stretch s = {t->pointer[operand], t->pointer[operand] + (w.axes ? w.size : t->count * w.size), row};
    for (int axis = 0; axis < w.axes; axis++)
        s.end += (w.length[axis] - 1) * w.stride[axis];
    return s;
}

static int by_first(const void *a, const void *b) {
    int64_t left = ((const stretch *)a)->first, right = ((const stretch *)b)->first;
    return (left > right) - (left < right);
}

/* Whether PREVIOUS and KEEP are one and the same: each block is then read before it is overwritten. */
static int in_place(const task *t, const int64_t *layouts) {
    if (t->pointer[PREVIOUS] != t->pointer[KEEP] || t->type[PREVIOUS] != t->type[KEEP])
        return 0;
    if (t->layout == 0)
        return 1;
    const int64_t axes = layouts[t->layout], *strides = layouts + t->layout + 1 + axes;
    return memcmp(strides + axes * PREVIOUS, strides + axes * KEEP, sizeof(int64_t) * (size_t)axes) == 0;
}

/* Whether an operand of some row, other than what it is compared with in place, overlaps one of the sorted stretches. */
static int overlaps(const task *tasks, int64_t n, const int64_t *layouts, const stretch *kept, int64_t count) {
    for (int64_t i = 0; i < n; i++)
        for (int operand = 0; operand < KEEP; operand++) {
            if (!tasks[i].pointer[operand] || !tasks[i].count)
                continue;
            stretch s = stretch_of(&tasks[i], layouts, operand, i);
            int64_t low = 0, high = count; /* the first stretch that ends after this one begins */
            while (low < high) {
                int64_t middle = low + (high - low) / 2;
                if (kept[middle].end <= s.first)
                    low = middle + 1;
                else
                    high = middle;
            }
            if (low == count || kept[low].first >= s.end)
                continue;
            if (operand != PREVIOUS || kept[low].row != i || !in_place(&tasks[i], layouts))
                return 1;
        }
    return 0;
}

/* Whether a walk may meet an entry twice: unless, by rising stride, each axis steps over all that the ones before it span. */
static int may_repeat(const walk *w) {
    int64_t span = w->size, least = 0;
    for (int done = 0; done < w->axes; done++) {
        int next = -1;
        for (int axis = 0; axis < w->axes; axis++)
            if (w->stride[axis] > least && (next < 0 || w->stride[axis] < w->stride[next]))
                next = axis;
        if (next < 0 || w->stride[next] < span)
            return 1; /* two of one stride, or one of 0, leave too few */
        least = w->stride[next];
        span += (w->length[next] - 1) * least;
    }
    return 0;
}

/* Whether each KEEP takes the gradient's bits as they are, and may be written while the rows are read in any order. */
static int may_keep(const task *tasks, int64_t n, const int64_t *layouts) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++)
        count += tasks[i].pointer[KEEP] && tasks[i].count;
    if (count == 0)
        return 1;
    stretch *kept = malloc(sizeof(stretch) * (size_t)count);
    if (!kept)
        return 0;
    int sorted = 1;
    for (int64_t i = 0, at = 0; i < n; i++)
        if (tasks[i].pointer[KEEP] && tasks[i].count) {
            walk w = walk_of(&tasks[i], layouts, KEEP);
            if (may_repeat(&w) || tasks[i].type[KEEP] != tasks[i].type[G]) {
                free(kept);
                return 0;
            }
            kept[at] = stretch_of(&tasks[i], layouts, KEEP, i);
            sorted &= at == 0 || kept[at - 1].first <= kept[at].first;
            at++;
        }
    if (!sorted)
        qsort(kept, (size_t)count, sizeof(stretch), by_first);
    int apart = 1;
    for (int64_t at = 1; at < count; at++)
        apart &= kept[at - 1].end <= kept[at].first;
    apart = apart && !overlaps(tasks, n, layouts, kept, count);
    free(kept);
    return apart;
}

/* --- what tensors are ------------------------------------------------------------------------------------------------------------ */

/* DLPack's form of a tensor, version 1. */
typedef struct {
    void *data;
    int32_t device_type, device;
    int32_t axes;
    uint8_t code, bits;
    uint16_t lanes;
    const int64_t *length, *stride;
    uint64_t byte_offset;
} dlpack;

/* Python's functions, to be called with the GIL: an object of a list, and what a tensor is; other than 0 with a Python error. */
typedef void *(*getter)(void *list, ptrdiff_t at);
typedef int (*asker)(void *object, dlpack *answer);

static int type_of(const dlpack *d) {
    if (d->lanes != 1)
        return -1;
    if (d->code == 4)
        return d->bits == 16 ? BFLOAT16 : -1;
    if (d->code != 2)
        return -1;
    return d->bits == 32 ? FLOAT32 : d->bits == 64 ? FLOAT64 : d->bits == 16 ? FLOAT16 : -1;
}

/* The entries of a tensor without gaps in logical order, -1 of any other. */
static int64_t straight_count(const dlpack *d) {
    int64_t count = 1;
    int straight = 1;
    for (int axis = d->axes - 1; axis >= 0; axis--) {
        straight &= d->length[axis] == 1 || !d->stride || d->stride[axis] == count;
        count *= d->length[axis];
    }
    return straight || count == 0 ? count : -1;
}

/* Fills in an operand of n tasks from a Python list: 1 if all are plain, contiguous and as large as the operands before them, and
 * lie within their storages. Those have `bytes`, the tensors begin `offsets` entries into them; `nothing` leaves a gap. */
EXPORT int gradlens_ask(getter get, asker ask, void *list, const void *nothing, const int64_t *offsets, const int64_t *bytes,
                        int64_t n, task *tasks, int operand) {
    for (int64_t i = 0; i < n; i++) {
        task *t = tasks + i;
        dlpack d;
        void *object = get(list, (ptrdiff_t)i);
        if (object == nothing)
            continue;
        if (!object || ask(object, &d) != 0)
            return 0;
        int type = type_of(&d);
        int64_t count = type < 0 || d.device_type != 1 ? -1 : straight_count(&d), room = *bytes++, skipped = *offsets++;
        if (count < 0 || (count > 0 && (!d.data || skipped + count > room / SIZE[type])))
            return 0;
        if (t->count >= 0 && t->count != count)
            return 0;
        t->count = count;
        t->type[operand] = type;
        t->pointer[operand] = count ? (int64_t)(intptr_t)((char *)d.data + d.byte_offset) : 1;
    }
    return 1;
}

/* Whether each tensor of a Python list is plain, contiguous, and where and what the tasks say. */
EXPORT int gradlens_same(getter get, asker ask, void *list, int64_t n, const task *tasks, int operand) {
    for (int64_t i = 0; i < n; i++) {
        const task *t = tasks + i;
        dlpack d;
        void *object = get(list, (ptrdiff_t)i);
        if (!object || ask(object, &d) != 0)
            return 0;
        if (d.device_type != 1 || type_of(&d) != t->type[operand] || straight_count(&d) != t->count)
            return 0;
        if (t->count && (int64_t)(intptr_t)((char *)d.data + d.byte_offset) != t->pointer[operand])
            return 0;
    }
    return 1;
}

/* --- the calls --------------------------------------------------------------------------------------------------------------------- */

/* 0, with nothing done, where a tensor that is to be overwritten shares memory with another that is read. */
static void summarize(const task *tasks, int64_t n, const int64_t *layouts, double *rows, int threads, int variant, int detail,
                      double *samples) {
    job model = {.tasks = tasks, .layouts = layouts, .rows = rows, .width = detail ? WIDTH : LIGHT_WIDTH, .work = SUMMARIZE[variant],
                 .write = write_summary, .counts = 1, .detail = detail, .samples = samples};
    run_all(&model, n, threads);
}

EXPORT int gradlens_summarize(const task *tasks, int64_t n, const int64_t *layouts, double *rows, int threads, int variant) {
    if (!may_keep(tasks, n, layouts))
        return 0;
    summarize(tasks, n, layouts, rows, threads, variant, 1, NULL);
    return 1;
}

/* The same without histograms. */
EXPORT int gradlens_summarize_light(const task *tasks, int64_t n, const int64_t *layouts, double *rows, int threads, int variant) {
    if (!may_keep(tasks, n, layouts))
        return 0;
    summarize(tasks, n, layouts, rows, threads, variant, 0, NULL);
    return 1;
}

/* The same of tasks without layouts that were found to keep what they may, with samples: 16 of each G, then 16 of its W. */
EXPORT void gradlens_read(const task *tasks, int64_t n, double *rows, double *samples, int threads, int variant, int detail) {
    summarize(tasks, n, NULL, rows, threads, variant, detail, samples);
}

EXPORT int gradlens_compare(const task *tasks, int64_t n, const int64_t *layouts, double *rows, int threads, int variant) {
    job model = {.tasks = tasks, .layouts = layouts, .rows = rows, .width = UPDATES, .work = COMPARE[variant], .write = write_update};
    run_all(&model, n, threads);
    return 1;
}

static void sample(const job *j, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        walk w = walk_of(&j->tasks[i], j->layouts, G);
        int64_t count = j->tasks[i].count;
        for (int k = 0; k < SAMPLES; k++) {
            uint64_t raw;
            float between;
            double value = 0;
            if (k < count) {
                value = *wide(line_of(&w, sample_place(count, k), 1, &raw), w.type, 1, &between, &value);
            }
            j->rows[i * SAMPLES + k] = value;
        }
    }
}

EXPORT int gradlens_sample(const task *tasks, int64_t n, const int64_t *layouts, double *rows, int threads, int variant) {
    job model = {.tasks = tasks, .layouts = layouts, .rows = rows};
    (void)threads, (void)variant;
    mode was = keep_subnormals();
    sample(&model, n);
    restore(was);
    return 1;
}

/* Whether the samples are bit for bit what `gradlens_read` took: 1 where those of all G are, plus 2 where those of all W are.
 * With `exact`, every entry of a W is held against its copy, where it has one. */
EXPORT int gradlens_unchanged(const task *tasks, int64_t n, const double *samples, int exact) {
    int same[2] = {1, 1};
    mode was = keep_subnormals();
    for (int64_t i = 0; i < n; i++, samples += 2 * SAMPLES)
        for (int operand = G; operand <= W; operand++) {
            int type = (int)tasks[i].type[operand];
            const char *base = (const char *)(intptr_t)tasks[i].pointer[operand];
            if (operand == W && exact && tasks[i].pointer[COPY]) {
                const char *copy = (const char *)(intptr_t)tasks[i].pointer[COPY];
                same[W] = same[W] && memcmp(base, copy, (size_t)(tasks[i].count * SIZE[type])) == 0;
                continue;
            }
            for (int k = 0; same[operand] && k < SAMPLES && k < tasks[i].count; k++) {
                float between;
                double value, now = *wide(base + sample_place(tasks[i].count, k) * SIZE[type], type, 1, &between, &value);
                same[operand] = bits_of_double(now) == bits_of_double(samples[operand * SAMPLES + k]);
            }
        }
    restore(was);
    return same[0] + 2 * same[1];
}

/* The same where each gradient and weight of two Python lists is where and what the tasks say; 0 where one is not. */
EXPORT int gradlens_stayed(getter get, asker ask, void *gradients, void *weights, int64_t n, const task *tasks,
                           const double *samples, int exact) {
    if (!gradlens_same(get, ask, gradients, n, tasks, G) || !gradlens_same(get, ask, weights, n, tasks, W))
        return 0;
    return gradlens_unchanged(tasks, n, samples, exact);
}

/* --- evidence -------------------------------------------------------------------------------------------------------------------- */

/* What is known of n weights, one number a weight: see `statistics/evidence.py`. */
typedef struct {
    const void *gradient;
    int type;
    double divisor, share, weight;
    double *mean, *squares;
    int32_t *positive, *negative;
} moments;

typedef struct {
    const double *gradient;
    double share;
    double *mean, *square;
    float *sign, *seen, *flips, *moving;
    int32_t *steps;
    int8_t *last;
} decayed;

INLINE void add_moments(const void *argument, int64_t start, int64_t stop) {
    const moments *m = argument;
    const double share = m->share, weight = m->weight, divisor = m->divisor;
    float between[BLOCK];
    double room[BLOCK];
    for (int64_t at = start; at < stop; at += BLOCK) {
        int n = (int)(stop - at < BLOCK ? stop - at : BLOCK);
        const double *g = wide((const char *)m->gradient + at * SIZE[m->type], m->type, n, between, room);
        double *restrict mean = m->mean + at, *restrict squares = m->squares + at;
        int32_t *restrict positive = m->positive + at, *restrict negative = m->negative + at;
        if (divisor != 1) {
            for (int i = 0; i < n; i++)
                room[i] = g[i] / divisor;
            g = room;
        }
        for (int i = 0; i < n; i++) {
            double step = g[i] - mean[i];
            mean[i] += share * step;
            squares[i] += weight * (step * (g[i] - mean[i]));
        }
        for (int i = 0; i < n; i++) {
            positive[i] += g[i] > 0;
            negative[i] += g[i] < 0;
        }
    }
}

/* Exponentially decayed means, in the form that torch has for shares below a half. What is not finite has share 0. */
INLINE void fold_decayed(const void *argument, int64_t start, int64_t stop) {
    const decayed *d = argument;
    const double share = d->share;
    float sign[BLOCK], both[BLOCK], narrow_share[BLOCK];
    for (int64_t at = start; at < stop; at += BLOCK) {
        int n = (int)(stop - at < BLOCK ? stop - at : BLOCK);
        const double *g = d->gradient + at;
        double *restrict mean = d->mean + at, *restrict square = d->square + at;
        for (int i = 0; i < n; i++) {
            int64_t fine = is_finite(g[i]);
            double x = fine ? g[i] : 0, part = fine ? share : 0;
            mean[i] += part * (x - mean[i]);
            square[i] += part * (x * x - square[i]);
            sign[i] = (float)((x > 0 ? 1.0 : 0.0) - (x < 0 ? 1.0 : 0.0));
            narrow_share[i] = (float)part;
        }
        int8_t *restrict last = d->last + at;
        int32_t *restrict steps = d->steps + at;
        for (int i = 0; i < n; i++) {
            both[i] = sign[i] * (float)last[i];
            last[i] = sign[i] != 0 ? (int8_t)sign[i] : last[i];
            steps[i] += narrow_share[i] != 0;
        }
        float *restrict signs = d->sign + at, *restrict seen = d->seen + at;
        for (int i = 0; i < n; i++) {
            signs[i] += narrow_share[i] * (sign[i] - signs[i]);
            seen[i] += narrow_share[i] * (fabsf(sign[i]) - seen[i]);
        }
        float *restrict flips = d->flips + at, *restrict moving = d->moving + at;
        for (int i = 0; i < n; i++) {
            flips[i] += narrow_share[i] * ((both[i] < 0 ? 1.0f : 0.0f) - flips[i]);
            moving[i] += narrow_share[i] * (fabsf(both[i]) - moving[i]);
        }
    }
}

typedef void (*part_of)(const void *, int64_t, int64_t);

#define EVIDENCE(name, attributes)                                                                                                \
    attributes static void add_moments_##name(const void *m, int64_t a, int64_t b) { add_moments(m, a, b); }                      \
    attributes static void fold_##name(const void *d, int64_t a, int64_t b) { fold_decayed(d, a, b); }

EVIDENCE(plain, )
#ifdef HAVE_VARIANTS
EVIDENCE(avx2, __attribute__((target("avx2,bmi,bmi2"))))
#else
#define add_moments_avx2 add_moments_plain
#define fold_avx2 fold_plain
#endif

typedef struct {
    part_of work;
    const void *argument;
    int64_t start, stop;
} share_of;

static void *work_exactly(void *argument) {
    const share_of *s = argument;
    mode was = keep_subnormals();
    s->work(s->argument, s->start, s->stop);
    restore(was);
    return NULL;
}

static void run_shares(share_of *shares, int threads) {
#ifdef HAVE_THREADS
    pthread_t handles[THREADS];
    int started[THREADS] = {0};
    for (int k = 1; k < threads; k++)
        started[k] = pthread_create(&handles[k], NULL, work_exactly, &shares[k]) == 0;
    work_exactly(&shares[0]);
    for (int k = 1; k < threads; k++)
        if (started[k])
            pthread_join(handles[k], NULL);
        else
            work_exactly(&shares[k]);
#else
    for (int k = 0; k < threads; k++)
        work_exactly(&shares[k]);
#endif
}

/* The k-th of so many even parts of n entries, in whole blocks. */
static share_of part(part_of work, const void *argument, int64_t n, int k, int threads) {
    int64_t start = n / threads * k / BLOCK * BLOCK, stop = k + 1 < threads ? n / threads * (k + 1) / BLOCK * BLOCK : n;
    return (share_of){work, argument, start, stop};
}

static int as_many(int threads) { return threads < 1 ? 1 : threads > THREADS ? THREADS : threads; }

static void for_all(part_of work, const void *argument, int64_t n, int threads) {
    share_of shares[THREADS];
    threads = as_many(threads);
    for (int k = 0; k < threads; k++)
        shares[k] = part(work, argument, n, k, threads);
    run_shares(shares, threads);
}

EXPORT void gradlens_add_moments(const moments *m, int64_t n, int threads, int variant) {
    for_all(variant ? add_moments_avx2 : add_moments_plain, m, n, threads);
}

EXPORT void gradlens_fold_decayed(const decayed *d, int64_t n, int threads, int variant) {
    for_all(variant ? fold_avx2 : fold_plain, d, n, threads);
}

/* --- activations ----------------------------------------------------------------------------------------------------------------- */

/* What a module made of a batch, `rows` examples of `columns` entries each, one behind the other: see `activations.py`. */
typedef struct {
    const void *made;
    int64_t type, rows, columns;
    double low, high;
    double *sums; /* OUTPUT of them */
} output;

enum { OUTPUT_NONFINITE, OUTPUT_SQUARE_SUM, OUTPUT_DEVIATION, OUTPUT_DEAD, OUTPUT_SATURATED, OUTPUT };

typedef struct {
    double first[BLOCK], sum[BLOCK], squares[BLOCK], sizes[BLOCK];
    int32_t alive[BLOCK];
    int64_t nonfinite, saturated;
} columns;

/* One example's part of a block, entry by entry: what is not finite counts as 0. */
INLINE void add_example(columns *c, const double *x, int n, double low, double high) {
    for (int i = 0; i < n; i++) {
        int fine = (int)is_finite(x[i]);
        double value = fine ? x[i] : 0, d = value - c->first[i];
        c->nonfinite += !fine;
        c->saturated += fine && (x[i] <= low || x[i] >= high);
        c->alive[i] |= x[i] != 0;
        c->sum[i] += d, c->squares[i] += d * d, c->sizes[i] += value * value;
    }
}

/* The same of four examples of floats, without a branch; returns 0 and adds nothing where something is not finite. */
INLINE int add_four(columns *c, const float *restrict const x[4], int n, float low, float high) {
    double *restrict first = c->first, *restrict sum = c->sum, *restrict squares = c->squares, *restrict sizes = c->sizes;
    int32_t *restrict alive = c->alive;
    const float *restrict p = x[0], *restrict q = x[1], *restrict r = x[2], *restrict s = x[3];
    int32_t bad = 0, outside = 0;
    for (int i = 0; i < n; i++) {
        bad |= !(fabsf(p[i]) <= FLT_MAX) | !(fabsf(q[i]) <= FLT_MAX) | !(fabsf(r[i]) <= FLT_MAX) | !(fabsf(s[i]) <= FLT_MAX);
        outside += ((p[i] <= low) | (p[i] >= high)) + ((q[i] <= low) | (q[i] >= high)) + ((r[i] <= low) | (r[i] >= high)) +
                   ((s[i] <= low) | (s[i] >= high));
        alive[i] |= (p[i] != 0) | (q[i] != 0) | (r[i] != 0) | (s[i] != 0);
    }
    if (bad)
        return 0;
    c->saturated += outside;
    for (int i = 0; i < n; i++) {
        double a = p[i], b = q[i], d = r[i], e = s[i], f = first[i];
        sizes[i] += (a * a + b * b) + (d * d + e * e);
        a -= f, b -= f, d -= f, e -= f;
        sum[i] += (a + b) + (d + e);
        squares[i] += (a * a + b * b) + (d * d + e * e);
    }
    return 1;
}

/* Columns [start, stop). Deviations are from the first example, so that what examples share does not cancel what differs. */
INLINE void read_columns(const void *argument, int64_t start, int64_t stop) {
    const output *o = argument;
    const int type = (int)o->type;
    const char *made = o->made;
    /* of floats: the nearest floats that let through the same entries */
    float low = (float)o->low, high = (float)o->high;
    low = low > o->low ? nextafterf(low, -INFINITY) : low, high = high < o->high ? nextafterf(high, INFINITY) : high;
    float between[4][BLOCK];
    double room[BLOCK];
    columns c;
    c.nonfinite = c.saturated = 0;
    int64_t dead = 0;
    double square_sum = 0, deviation = 0;
    for (int64_t at = start; at < stop; at += BLOCK) {
        const int n = (int)(stop - at < BLOCK ? stop - at : BLOCK);
        const size_t bytes = (size_t)n * sizeof *c.sum;
        memset(c.sum, 0, bytes), memset(c.squares, 0, bytes), memset(c.sizes, 0, bytes);
        memset(c.alive, 0, (size_t)n * sizeof *c.alive);
        const double *begin = wide(made + at * SIZE[type], type, n, between[0], room);
        for (int i = 0; i < n; i++)
            c.first[i] = is_finite(begin[i]) ? begin[i] : 0;
        int64_t row = 0;
        while (row < o->rows) {
            if (type != FLOAT64 && row + 4 <= o->rows) {
                const float *lines[4];
                for (int k = 0; k < 4; k++)
                    lines[k] = narrow(made + ((row + k) * o->columns + at) * SIZE[type], type, n, between[k]);
                if (add_four(&c, lines, n, low, high)) {
                    row += 4;
                    continue;
                }
            }
            int64_t end = type != FLOAT64 && row + 4 <= o->rows ? row + 4 : row + 1;
            for (; row < end; row++)
                add_example(&c, wide(made + (row * o->columns + at) * SIZE[type], type, n, between[0], room), n, o->low, o->high);
        }
        for (int i = 0; i < n; i++) {
            double rest = c.squares[i] - c.sum[i] * c.sum[i] / (double)o->rows;
            deviation += rest > 0 ? rest : 0;
            square_sum += c.sizes[i];
            dead += !c.alive[i];
        }
    }
    double *sums = o->sums;
    sums[OUTPUT_NONFINITE] = (double)c.nonfinite, sums[OUTPUT_SQUARE_SUM] = square_sum, sums[OUTPUT_DEVIATION] = deviation;
    sums[OUTPUT_DEAD] = (double)dead, sums[OUTPUT_SATURATED] = (double)c.saturated;
}

#define COLUMNS(name, attributes)                                                                                                 \
    attributes static void read_columns_##name(const void *o, int64_t a, int64_t b) { read_columns(o, a, b); }

COLUMNS(plain, )
#ifdef HAVE_VARIANTS
COLUMNS(avx2, __attribute__((target("avx2,bmi,bmi2"))))
#else
#define read_columns_avx2 read_columns_plain
#endif

EXPORT void gradlens_output(const output *whole, int threads, int variant) {
    output parts[THREADS];
    double sums[THREADS][OUTPUT] = {{0}};
    share_of shares[THREADS];
    threads = as_many(threads);
    for (int k = 0; k < threads; k++) {
        parts[k] = *whole;
        parts[k].sums = sums[k];
        shares[k] = part(variant ? read_columns_avx2 : read_columns_plain, &parts[k], whole->columns, k, threads);
    }
    run_shares(shares, threads);
    for (int i = 0; i < OUTPUT; i++) {
        whole->sums[i] = 0;
        for (int k = 0; k < threads; k++)
            whole->sums[i] += sums[k][i];
    }
}
