// The loops of octavo's rounding: the bits of octavo.numerics, one pass over memory each.
//
// Compiled on the user's machine by native.py with IEEE division, without contraction and without fast-math,
// and called through ctypes. Threads are those of torch: its GOMP_parallel is handed in. Only integer reductions and
// element-wise arithmetic, so the result does not depend on the number of threads or on the width of a vector.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// ---- what Python hands over (compiled.py has the same structures) ----------------------------------------------

enum Kind : int32_t { INTEGER = 0, SMALL_FLOAT = 1, CODEBOOK = 2 };

struct Element {
    int32_t kind, bits, mantissa_bits, bias, nan_code;  // nan_code: -1 where no code is a NaN
    int32_t num_values;                                 // of a codebook
    float low, high, unit, min_normal, subnormals_per_one;
    const float* values;      // codebook, ascending
    const float* thresholds;  // the largest number that still rounds down, between every two of them
};

// A tensor as rows of `width` values (the last row ends with the tensor), each row in groups of `size` values (the
// last group may be short). `tile_rows` neighbouring rows of one matrix of `matrix_rows` rows share their scales.
struct Blocks {
    int64_t num_values, width, size, matrix_rows, tile_rows;
    int64_t is_padded;  // a short group is filled with zeros, which count in its range

    int64_t rows() const { return (num_values + width - 1) / width; }
    int64_t groups() const { return (width + size - 1) / size; }
    int64_t scale_row(int64_t row) const {
        const int64_t per_matrix = (matrix_rows + tile_rows - 1) / tile_rows;
        return row / matrix_rows * per_matrix + row % matrix_rows / tile_rows;
    }
};

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Threads {
    Parallel run;  // null: this thread alone
    int32_t count;
};

// ---- threads ---------------------------------------------------------------------------------------------------

constexpr int64_t GRAIN = 1 << 15;  // values that are worth waking a thread for

template <class Work>
struct Shared {
    const Work& work;
    int64_t rows, chunk;
    std::atomic<int64_t> next;

    static void help(void* self) {
        auto& job = *static_cast<Shared*>(self);
        for (int64_t begin; (begin = job.next.fetch_add(job.chunk)) < job.rows;) {
            job.work(begin, std::min(begin + job.chunk, job.rows));
        }
    }
};

template <class Work>
void for_rows(int64_t rows, int64_t width, const Threads& threads, const Work& work) {
    const int64_t chunk = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, width));
    const int64_t helpers = std::min<int64_t>(threads.count, (rows + chunk - 1) / chunk);
    if (threads.run == nullptr || helpers < 2) {
        work(int64_t(0), rows);
        return;
    }
    Shared<Work> job{work, rows, chunk, {0}};
    threads.run(&Shared<Work>::help, &job, unsigned(helpers), 0);
}

// ---- numbers ---------------------------------------------------------------------------------------------------

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

struct Brain {  // bfloat16
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(Brain x) { return float_of(uint32_t(x.bits) << 16); }

inline void store(float x, float& to) { to = x; }
inline void store(float x, Brain& to) {  // to nearest, ties to even
    const uint32_t bits = bits_of(x), nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : nearest);
}

inline float clamped(float y, float low, float high) {  // NaN stays
    y = y < low ? low : y;
    return y > high ? high : y;
}

constexpr float INTEGER_MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for a fraction

struct Integers {
    float low, high, unit, per_unit;  // the unit is a power of two: multiplying by its inverse is dividing by it

    explicit Integers(const Element& e)
        : low(e.low / e.unit), high(e.high / e.unit), unit(e.unit), per_unit(1 / e.unit) {}
    float whole(float y) const { return clamped(y * per_unit, low, high) + INTEGER_MAGIC - INTEGER_MAGIC; }
    float round(float y, float) const { return whole(y) * unit; }
    uint8_t code(float y, float) const { return uint8_t(int32_t(whole(y))); }
};

struct ShiftedIntegers {  // with a zero point; their unit is 1
    float low, high;

    explicit ShiftedIntegers(const Element& e) : low(e.low), high(e.high) {}
    float whole(float y, float zero) const {
        return clamped(std::nearbyint(y) + zero, low, high) + INTEGER_MAGIC - INTEGER_MAGIC;
    }
    float round(float y, float zero) const { return whole(y, zero) - zero; }
    uint8_t code(float y, float zero) const { return uint8_t(int32_t(whole(y, zero))); }
};

struct SmallFloats {
    float low, high, min_normal, factor, subnormals_per_one;
    uint32_t nan_above;  // magnitudes that are written as `nan_code`: NaN, or none
    int32_t nan_code, rebias, shift, sign_shift;

    explicit SmallFloats(const Element& e)
        : low(e.low), high(e.high), min_normal(e.min_normal), factor(1.5f * float(1 << (23 - e.mantissa_bits))),
          subnormals_per_one(e.subnormals_per_one), nan_above(e.nan_code < 0 ? 0x7FFFFFFFu : 0x7F800000u),
          nan_code(e.nan_code), rebias((127 - e.bias) << e.mantissa_bits), shift(23 - e.mantissa_bits),
          sign_shift(e.bits - 1) {}

    // In the binade of `magic` one unit in the last place is the distance between two neighbours of the format.
    float round(float y, float) const {
        y = clamped(y, low, high);
        float power = float_of(bits_of(y) & 0x7F800000u);
        power = power < min_normal ? min_normal : power;
        const float magic = power * factor;
        return std::copysign(y + magic - magic, y);
    }
    uint8_t code(float y, float) const {
        const uint32_t bits = bits_of(round(y, 0)), magnitude = bits & 0x7FFFFFFFu;
        const float size = float_of(magnitude);
        // Below the normal numbers the code counts the smallest ones: the cast is not asked about anything else.
        const int32_t subnormal = int32_t((size < min_normal ? size : 0.0f) * subnormals_per_one);
        const int32_t normal = int32_t(magnitude >> shift) - rebias;
        int32_t code = size < min_normal ? subnormal : normal;
        code = magnitude > nan_above ? nan_code : code;
        return uint8_t(code | int32_t(bits >> 31 << sign_shift));
    }
};

struct Codebook {
    const float *values, *thresholds;
    int last;

    explicit Codebook(const Element& e) : values(e.values), thresholds(e.thresholds), last(e.num_values - 1) {}
    float round(float y, float) const {
        float nearest = values[0];
        for (int i = 0; i < last; ++i) nearest = y > thresholds[i] ? values[i + 1] : nearest;
        return y == y ? nearest : y;
    }
    uint8_t code(float y, float) const {
        int32_t nearest = 0;
        for (int i = 0; i < last; ++i) nearest = y > thresholds[i] ? i + 1 : nearest;
        return uint8_t(y == y ? nearest : last);
    }
};

// ---- one row ---------------------------------------------------------------------------------------------------

template <class In, class E>
inline void round_group(const In* x, In* out, int64_t count, float scale, float zero, const E element) {
    const float divisor = scale == 0 ? 1.0f : scale;
    for (int64_t i = 0; i < count; ++i) store(element.round(load(x[i]) / divisor, zero) * scale, out[i]);
}

template <class In, class E>
inline void encode_group(const In* x, uint8_t* out, int64_t count, float scale, float zero, const E element) {
    const float divisor = scale == 0 ? 1.0f : scale;
    for (int64_t i = 0; i < count; ++i) out[i] = element.code(load(x[i]) / divisor, zero);
}

// Calls `group(begin, count, index)` for every group of a row; short groups of known size become straight code.
template <class Group>
inline void for_groups(int64_t width, int64_t size, const Group& group) {
    const int64_t full = width / size, rest = width % size;
    switch (size) {
        case 16:
            for (int64_t g = 0; g < full; ++g) group(g * 16, int64_t(16), g);
            break;
        case 32:
            for (int64_t g = 0; g < full; ++g) group(g * 32, int64_t(32), g);
            break;
        default:
            for (int64_t g = 0; g < full; ++g) group(g * size, size, g);
    }
    if (rest) group(full * size, rest, full);
}

template <class Row>
void for_scaled_rows(const Blocks& blocks, const Threads& threads, const Row& row) {
    const int64_t rows = blocks.rows(), groups = blocks.groups();
    for_rows(rows, blocks.width, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t start = r * blocks.width;
            row(start, std::min(blocks.width, blocks.num_values - start), blocks.scale_row(r) * groups);
        }
    });
}

template <class In, class E>
void round_all(const In* x, In* out, const float* scale, const float* zero, const E element, const Blocks& blocks,
               const Threads& threads) {
    for_scaled_rows(blocks, threads, [=](int64_t start, int64_t width, int64_t scales) {
        for_groups(width, blocks.size, [=](int64_t begin, int64_t count, int64_t g) {
            round_group(x + start + begin, out + start + begin, count, scale[scales + g],
                        zero ? zero[scales + g] : 0.0f, element);
        });
    });
}

template <class In, class E>
void encode_all(const In* x, uint8_t* out, const float* scale, const float* zero, const E element,
                const Blocks& blocks, const Threads& threads) {
    for_scaled_rows(blocks, threads, [=](int64_t start, int64_t width, int64_t scales) {
        for_groups(width, blocks.size, [=](int64_t begin, int64_t count, int64_t g) {
            encode_group(x + start + begin, out + start + begin, count, scale[scales + g],
                         zero ? zero[scales + g] : 0.0f, element);
        });
    });
}

template <class Work>
void with_element(const Element& element, bool has_zero, const Work& work) {
    switch (element.kind) {
        case INTEGER:
            if (has_zero) {
                work(ShiftedIntegers(element));
            } else {
                work(Integers(element));
            }
            break;
        case SMALL_FLOAT: work(SmallFloats(element)); break;
        default: work(Codebook(element));
    }
}

// The order of numbers as integers: NaN of either sign at the ends.
inline int32_t key_of(uint32_t bits) { return int32_t(bits ^ (uint32_t(int32_t(bits) >> 31) >> 1)); }
inline float of_key(int32_t key) { return float_of(uint32_t(key) ^ (uint32_t(key >> 31) >> 1)); }

template <class In>
void amax_all(const In* x, float* out, const Blocks& blocks, const Threads& threads) {
    const int64_t groups = blocks.groups();
    for_rows(blocks.rows(), blocks.width, threads, [=](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t start = r * blocks.width, width = std::min(blocks.width, blocks.num_values - start);
            for_groups(width, blocks.size, [=](int64_t from, int64_t count, int64_t g) {
                uint32_t largest = 0;  // of magnitudes as integers: NaN is the largest of all
                const In* values = x + start + from;
                for (int64_t i = 0; i < count; ++i) largest = std::max(largest, bits_of(load(values[i])) & 0x7FFFFFFFu);
                out[r * groups + g] = float_of(largest);
            });
        }
    });
}

template <class In>
void min_max_all(const In* x, float* low, float* high, const Blocks& blocks, const Threads& threads) {
    const int64_t groups = blocks.groups();
    for_rows(blocks.rows(), blocks.width, threads, [=](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t start = r * blocks.width, width = std::min(blocks.width, blocks.num_values - start);
            for_groups(width, blocks.size, [=](int64_t from, int64_t count, int64_t g) {
                int32_t smallest = INT32_MAX, largest = INT32_MIN;
                const In* values = x + start + from;
                for (int64_t i = 0; i < count; ++i) {
                    const int32_t key = key_of(bits_of(load(values[i])));
                    smallest = std::min(smallest, key);
                    largest = std::max(largest, key);
                }
                if (blocks.is_padded && count < blocks.size) {
                    smallest = std::min(smallest, 0);
                    largest = std::max(largest, 0);
                }
                const float a = of_key(smallest), b = of_key(largest);
                low[r * groups + g] = b == b ? a : b;
                high[r * groups + g] = a == a ? b : a;
            });
        }
    });
}

constexpr int64_t LONGEST_SUM = 1 << 16;

// Squared errors of a row, added in the order of numerics: the second half to the first until one is left.
template <class E>
float squared_error(const float* x, int64_t width, float scale, const E element, float* errors) {
    for (int64_t i = 0; i < width; ++i) {
        const float error = element.round(x[i] / scale, 0) * scale - x[i];
        errors[i] = error * error;
    }
    for (int64_t left = width; left > 1;) {
        const int64_t half = left / 2, rest = left - half;
        for (int64_t i = 0; i < half; ++i) errors[i] += errors[rest + i];
        left = rest;
    }
    return errors[0];
}

// Little-endian bit streams, every row padded to whole bytes.
template <int BITS>
void pack_row(const uint8_t* codes, uint8_t* out, int64_t count) {
    constexpr uint64_t mask = (1u << BITS) - 1;
    const int64_t cycles = count / 8;
    for (int64_t c = 0; c < cycles; ++c) {
        uint64_t word = 0;
        for (int i = 0; i < 8; ++i) word |= (codes[c * 8 + i] & mask) << (i * BITS);
        for (int i = 0; i < BITS; ++i) out[c * BITS + i] = uint8_t(word >> (8 * i));
    }
    uint64_t word = 0;
    const int64_t rest = count % 8;
    for (int64_t i = 0; i < rest; ++i) word |= (codes[cycles * 8 + i] & mask) << (i * BITS);
    for (int64_t i = 0; i < (rest * BITS + 7) / 8; ++i) out[cycles * BITS + i] = uint8_t(word >> (8 * i));
}

template <>
void pack_row<4>(const uint8_t* codes, uint8_t* out, int64_t count) {
    for (int64_t i = 0; i < count / 2; ++i) out[i] = uint8_t((codes[2 * i] & 15) | (codes[2 * i + 1] << 4));
    if (count % 2) out[count / 2] = codes[count - 1] & 15;
}

}  // namespace

// ---- what Python calls -----------------------------------------------------------------------------------------

extern "C" {

// dtype: 0 fp32, 1 bf16; `zero` may be null
void octavo_fake_quantize(int32_t dtype, const void* x, void* out, const float* scale, const float* zero,
                          const Element* element, const Blocks* blocks, const Threads* threads) {
    with_element(*element, zero != nullptr, [&](const auto& e) {
        if (dtype == 0) {
            round_all(static_cast<const float*>(x), static_cast<float*>(out), scale, zero, e, *blocks, *threads);
        } else {
            round_all(static_cast<const Brain*>(x), static_cast<Brain*>(out), scale, zero, e, *blocks, *threads);
        }
    });
}

void octavo_codes(int32_t dtype, const void* x, uint8_t* out, const float* scale, const float* zero,
                  const Element* element, const Blocks* blocks, const Threads* threads) {
    with_element(*element, zero != nullptr, [&](const auto& e) {
        if (dtype == 0) {
            encode_all(static_cast<const float*>(x), out, scale, zero, e, *blocks, *threads);
        } else {
            encode_all(static_cast<const Brain*>(x), out, scale, zero, e, *blocks, *threads);
        }
    });
}

// Ranges of groups, one for each group of each row: rows that share a scale are the caller's to join.
void octavo_amax(int32_t dtype, const void* x, float* out, const Blocks* blocks, const Threads* threads) {
    if (dtype == 0) {
        amax_all(static_cast<const float*>(x), out, *blocks, *threads);
    } else {
        amax_all(static_cast<const Brain*>(x), out, *blocks, *threads);
    }
}

void octavo_min_max(int32_t dtype, const void* x, float* low, float* high, const Blocks* blocks,
                    const Threads* threads) {
    if (dtype == 0) {
        min_max_all(static_cast<const float*>(x), low, high, *blocks, *threads);
    } else {
        min_max_all(static_cast<const Brain*>(x), low, high, *blocks, *threads);
    }
}

// Rows of at most LONGEST_SUM values, each with its scale; no zero points.
void octavo_squared_error(const float* x, const float* scale, float* out, int64_t rows, int64_t width,
                          const Element* element, const Threads* threads) {
    with_element(*element, false, [&](const auto e) {
        for_rows(rows, width, *threads, [=](int64_t begin, int64_t end) {
            alignas(64) static thread_local float errors[LONGEST_SUM];
            for (int64_t r = begin; r < end; ++r) {
                out[r] = squared_error(x + r * width, width, scale[r], e, errors);
            }
        });
    });
}

void octavo_pack(const uint8_t* codes, uint8_t* out, int64_t rows, int64_t width, int32_t bits,
                 const Threads* threads) {
    const int64_t row_bytes = (width * bits + 7) / 8;
    for_rows(rows, width, *threads, [=](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const uint8_t* from = codes + r * width;
            uint8_t* to = out + r * row_bytes;
            switch (bits) {
                case 1: pack_row<1>(from, to, width); break;
                case 2: pack_row<2>(from, to, width); break;
                case 3: pack_row<3>(from, to, width); break;
                case 4: pack_row<4>(from, to, width); break;
                case 5: pack_row<5>(from, to, width); break;
                case 6: pack_row<6>(from, to, width); break;
                default: pack_row<7>(from, to, width);
            }
        }
    });
}

}  // extern "C"
