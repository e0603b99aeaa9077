/* scales.h: the f16 scale of a group of weights: from the largest one, or the best of a fixed list. */
#ifndef DM_SCALES_H
#define DM_SCALES_H

DM_INLINE int is_finite(float x) { return (f32_bits(x) & DM_ABS_MASK) < DM_INFINITY_BITS; }

/* The largest magnitudes (as bits) among the finite weights above and below zero, and the number of the others. */
typedef struct extremes {
    int32_t above, below;
    size_t bad;
} extremes;

static extremes find_extremes(const float *weights, size_t n) {
    i32v above = {0}, below = {0}, bad = {0};
    for (size_t i = 0; i < n; i += DM_LANES) {
        i32v bits = (i32v)load_f32_part(weights + i, n - i);
        i32v magnitude = bits & DM_ABS_MASK;
        i32v finite = magnitude < DM_INFINITY_BITS;
        i32v negative = bits >> 31;
        above = max_i32(magnitude & finite & ~negative, above);
        below = max_i32(magnitude & finite & negative, below);
        bad -= ~finite;
    }
    extremes found = {highest_i32(above), highest_i32(below), 0};
    for (size_t i = 0; i < DM_LANES; i++) found.bad += (size_t)bad[i];
    return found;
}

/* q8: amax / 127. q4: the weight of largest magnitude, the first one on ties, becomes -8. */
static uint16_t scale_bits(const float *weights, size_t n, int format, extremes found) {
    int32_t amax_bits = found.above > found.below ? found.above : found.below;
    float amax = f32_from_bits((uint32_t)amax_bits);
    if (format == DM_Q8) return narrow_f16(amax / 127.0f);
    int negative = found.below > found.above;
    if (found.below == found.above) {
        size_t first = 0;
        while (first < n && __builtin_fabsf(weights[first]) != amax) first++;
        negative = first < n && weights[first] < 0.0f;
    }
    return narrow_f16(negative ? amax / 8.0f : amax / -8.0f);
}

/* What the search tries: the weight of largest magnitude becomes one of these multiples of the scale, in this order. */
static const float q4_candidates[] = {-7.0f, -7.25f, -7.5f,  -7.75f,  -8.25f, -8.5f, -8.75f,
                                      -9.0f, -9.5f,  -10.0f, -10.75f, 6.5f,   6.75f, 7.0f,
                                      7.25f, 7.5f,   7.75f,  8.0f,    8.5f,   9.0f,  9.5f};
static const float q8_candidates[] = {120.0f, 122.0f, 124.0f, 125.0f, 126.0f, 126.5f,
                                      127.5f, 128.0f, 129.0f, 130.0f, 132.0f};

/* Times that the scale is fitted to the integers which it gave. */
#define DM_SCALE_FITS 2

/* The weighted squared error of a group, and the sums of w q and q^2. */
typedef struct scale_error {
    float error, products, squares;
} scale_error;

static scale_error find_scale_error(const float *weights, const float *importance, size_t n, float d, float lowest,
                                    float highest) {
    const float inverse = 1.0f / d;
    f32x16 error = zero_f32x16(), products = zero_f32x16(), squares = zero_f32x16();
    for (size_t i = 0; i < n; i += 16) {
        for (size_t part = 0; part < DM_PARTS && i + part * DM_LANES < n; part++) {
            const size_t at = i + part * DM_LANES;
            f32v w = load_f32_part(weights + at, n - at);
            w = select_f32(abs_bits(w) < DM_INFINITY_BITS, w, (f32v){0});
            f32v ratio = max_f32(min_f32(w * inverse, all_f32(highest)), all_f32(lowest));
            f32v q = __builtin_convertvector(round_i32(ratio), f32v);
            f32v weight = importance == NULL ? all_f32(1.0f) : load_f32_part(importance + at, n - at);
            f32v off = fma_lanes(q, all_f32(-d), w), weighted_q = q * weight;
            error.part[part] = fma_lanes(off * weight, off, error.part[part]);
            products.part[part] = fma_lanes(weighted_q, w, products.part[part]);
            squares.part[part] = fma_lanes(weighted_q, q, squares.part[part]);
        }
    }
    return (scale_error){sum_tree(error), sum_tree(products), sum_tree(squares)};
}

/* The scale of least error, as it is stored: `first`, one of the candidates, or one fitted to the best one's integers.
 * Of equals the first stays. */
static uint16_t search_scale(const float *weights, const float *importance, size_t n, int format, float extreme,
                             uint16_t first) {
    const float lowest = format == DM_Q8 ? -127.0f : -8.0f, highest = format == DM_Q8 ? 127.0f : 7.0f;
    const float *candidates = format == DM_Q8 ? q8_candidates : q4_candidates;
    const size_t count = (format == DM_Q8 ? sizeof q8_candidates : sizeof q4_candidates) / sizeof *candidates;
    uint16_t best_bits = first;
    scale_error best = find_scale_error(weights, importance, n, widen_f16_one(first), lowest, highest);
    for (size_t i = 0; i < count + DM_SCALE_FITS; i++) {
        if (i >= count && !(best.squares > 0.0f)) break;
        uint16_t bits = narrow_f16(i < count ? extreme / candidates[i] : best.products / best.squares);
        if ((bits & 0x7fff) == 0 || (bits & 0x7c00) == 0x7c00 || bits == best_bits) continue;
        scale_error tried = find_scale_error(weights, importance, n, widen_f16_one(bits), lowest, highest);
        if (!(tried.error < best.error)) continue;
        best = tried;
        best_bits = bits;
    }
    return best_bits;
}

static uint16_t choose_scale_bits(const float *weights, const float *importance, size_t n, int format, int scales,
                                  extremes found) {
    uint16_t bits = scale_bits(weights, n, format, found);
    if (scales == DM_SCALES_ABSMAX || (bits & 0x7fff) == 0 || (bits & 0x7c00) == 0x7c00) return bits;
    int32_t amax_bits = found.above > found.below ? found.above : found.below;
    float amax = f32_from_bits((uint32_t)amax_bits);
    /* q4's first scale is the extreme weight / -8, so its sign says which of the two ends that weight is at. */
    float extreme = format == DM_Q8 || (bits & 0x8000) != 0 ? amax : -amax;
    return search_scale(weights, importance, n, format, extreme, bits);
}

static float row_scale(const float *weights_C, const float *importance_C, size_t C, int format, int scales) {
    uint16_t bits = choose_scale_bits(weights_C, importance_C, C, format, scales, find_extremes(weights_C, C));
    return (bits & 0x7c00) == 0x7c00 ? f32_from_bits(DM_INFINITY_BITS) : widen_f16_one(bits);
}

#endif
