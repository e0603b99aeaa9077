/* scales.h: the f16 scales of groups of weights, from the largest weight or of least error; one row per lane.
 *
 * A tile's weights stand as [C][16]: column c of row r at 16 c + r. A function here works on DM_LANES of the 16 rows,
 * and every sum goes over a row's columns in ascending order.
 */
#ifndef DM_SCALES_H
#define DM_SCALES_H

/* One group of each of DM_LANES rows: n columns. importance: how much the squared error of each counts; NULL: 1. */
typedef struct lane_group {
    const float *weights;
    const float *importance;
    size_t n;
} lane_group;

/* The format's integers. */
typedef struct code_range {
    float lowest, highest;
} code_range;

/* What integers say about a scale: the sums of i (w - d q)^2, i w q and i q^2. */
typedef struct scale_sums {
    f32v error, products, squares;
} scale_sums;

/* The search maps the extreme weight to each of these; q4 to the end of its range that has the integer more. */
#define DM_CANDIDATES 8
static const float q4_candidates[DM_CANDIDATES] = {-8.0f, -8.375f, -7.75f, -8.125f, -7.25f, -8.625f, -6.875f, -9.0f};
static const float q8_candidates[DM_CANDIDATES] = {126.0f, 125.0f, 124.0f, 123.0f, 122.0f, 121.0f, 120.0f, 127.25f};

DM_INLINE code_range range_of(int format) {
    return format == DM_Q8 ? (code_range){-127.0f, 127.0f} : (code_range){-8.0f, 7.0f};
}

/* The nearest f16; infinity if that is beyond its range, or of a NaN. */
DM_INLINE f32v round_f16(f32v x) {
    const u32v sign = (u32v)x & 0x80000000u, magnitude = (u32v)x & DM_ABS_MASK;
    /* Below 2^-14 a step of f16 is 2^-24, the one of floats from 0.5 on. */
    const f32v tiny = ((f32v)magnitude + 0.5f) - 0.5f;
    const u32v normal = (magnitude + 0xfff + ((magnitude >> 13) & 1)) & ~0x1fffu;
    const f32v rounded = select_f32((i32v)magnitude < 0x38800000, tiny, (f32v)normal);
    const f32v infinity = (f32v)all_i32(DM_INFINITY_BITS);
    return (f32v)((u32v)select_f32((i32v)magnitude >= 0x477ff000, infinity, rounded) | sign);
}

/* Neither 0 nor infinite. */
DM_INLINE i32v is_usable(f32v scale) { return (abs_bits(scale) > 0) & (abs_bits(scale) < DM_INFINITY_BITS); }

/* Each row's weight of largest magnitude, the first of equals; +0 if all are 0. */
DM_INLINE f32v find_extreme(const float *weights, size_t n) {
    f32v extreme = {0};
    i32v largest = {0};
    for (size_t c = 0; c < n; c++) {
        const f32v w = load_f32(weights + 16 * c);
        const i32v magnitude = abs_bits(w);
        extreme = select_f32(magnitude > largest, w, extreme);
        largest = max_i32(magnitude, largest);
    }
    return extreme;
}

/* rint(w * inverse), to even, in the range. Clamping first gives the same and keeps the rounding exact. */
DM_INLINE f32v nearest_code(f32v w, f32v inverse, code_range range) {
    const f32v ratio = max_f32(all_f32(range.lowest), min_f32(all_f32(range.highest), w * inverse));
    return (ratio + 0x1.8p23f) - 0x1.8p23f;
}

/* Adds one column's terms; `weighted` is i q. */
DM_INLINE void add_fit_terms(f32v *products, f32v *squares, f32v w, f32v q, f32v weighted) {
    *products = fma_lanes(weighted, w, *products);
    *squares = fma_lanes(weighted, q, *squares);
}

/* Two of the candidates at once: *gain and *scale become those of the fitted scale that takes most off the error. */
DM_INLINE void try_candidates(f32v *gain, f32v *scale, const lane_group *group, f32v first, f32v second,
                              code_range range) {
    f32v products[2] = {{0}}, squares[2] = {{0}};
    for (size_t c = 0; c < group->n; c++) {
        const f32v w = load_f32(group->weights + 16 * c);
        const f32v q[2] = {nearest_code(w, first, range), nearest_code(w, second, range)};
        const f32v weight = all_f32(group->importance == NULL ? 1.0f : group->importance[c]);
        for (size_t i = 0; i < 2; i++) {
            const f32v weighted = group->importance == NULL ? q[i] : q[i] * weight;
            add_fit_terms(&products[i], &squares[i], w, q[i], weighted);
        }
    }
    for (size_t i = 0; i < 2; i++) {
        const f32v fitted = products[i] / squares[i], fitted_gain = products[i] * fitted;
        const i32v better = fitted_gain > *gain;
        *gain = select_f32(better, fitted_gain, *gain);
        *scale = select_f32(better, fitted, *scale);
    }
}

/* The sums for the integers that a scale gives. */
DM_INLINE scale_sums sum_errors(const lane_group *group, f32v scale, code_range range) {
    scale_sums sums = {{0}, {0}, {0}};
    const f32v inverse = 1.0f / scale;
    for (size_t c = 0; c < group->n; c++) {
        const f32v w = load_f32(group->weights + 16 * c), q = nearest_code(w, inverse, range);
        const f32v off = fma_lanes(q, -scale, w);
        const f32v weight = all_f32(group->importance == NULL ? 1.0f : group->importance[c]);
        sums.error = fma_lanes(group->importance == NULL ? off : off * weight, off, sums.error);
        add_fit_terms(&sums.products, &sums.squares, w, q, group->importance == NULL ? q : q * weight);
    }
    return sums;
}

/* Of `absmax`, the best candidate's fitted scale and the one fitted to its integers once more, all as f16, the one of
 * least error; of equals the first. Lanes whose absmax is not usable are left alone. */
DM_INLINE f32v search_scale(const lane_group *group, f32v extreme, f32v absmax, int format) {
    const code_range range = range_of(format);
    const float *candidates = format == DM_Q8 ? q8_candidates : q4_candidates;
    const i32v usable = is_usable(absmax);
    const f32v one = all_f32(1.0f), start = select_f32(usable, absmax, one);
    const f32v inverse = 1.0f / select_f32(usable, extreme, one);
    f32v gain = {0}, scale = start;
    for (size_t i = 0; i < DM_CANDIDATES; i += 2)
        try_candidates(&gain, &scale, group, inverse * candidates[i], inverse * candidates[i + 1], range);
    f32v best = start, least = sum_errors(group, start, range).error;
    for (int fit = 0; fit < 2; fit++) {
        scale = round_f16(scale);
        scale = select_f32(is_usable(scale), scale, start);
        const scale_sums tried = sum_errors(group, scale, range);
        const i32v better = tried.error < least;
        best = select_f32(better, scale, best);
        least = select_f32(better, tried.error, least);
        scale = tried.products / tried.squares;
    }
    return select_f32(usable, best, absmax);
}

/* The scale of a group, as f16 can hold it, or infinity. absmax: q8 |extreme| / 127; q4 extreme / -8, so that the end
 * of the range with the integer more is used. */
DM_INLINE f32v choose_scale(const lane_group *group, int format, int scales) {
    f32v extreme = find_extreme(group->weights, group->n);
    if (format == DM_Q8) extreme = (f32v)abs_bits(extreme);
    const f32v absmax = round_f16(format == DM_Q8 ? extreme / 127.0f : extreme / -8.0f);
    if (scales == DM_SCALES_ABSMAX) return absmax;
    if (group->importance != NULL) return search_scale(group, extreme, absmax, format);
    const lane_group plain = {group->weights, NULL, group->n};
    return search_scale(&plain, extreme, absmax, format);
}

#endif
