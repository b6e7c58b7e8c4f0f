static inline void net_scaled(const uint8_t *pixels, int32_t inputs, float scale, float *x)
{
    for (int32_t i = 0; i < inputs; ++i) {
        x[i] = (float)pixels[i] * scale;
    }
}

/* Products of numbers and real weights, of numbers and signs, of signs and real weights. */
static inline float net_real_product(const float *x, const float *w, int32_t inputs)
{
    float sum = 0;
    for (int32_t i = 0; i < inputs; ++i) {
        sum += x[i] * w[i];
    }
    return sum;
}

static inline float net_signed_sum(const float *x, const uint32_t *signs, int32_t inputs)
{
    float sum = 0;
    for (int32_t i = 0; i < inputs; ++i) {
        sum += net_is_plus(signs, i) ? x[i] : -x[i];
    }
    return sum;
}
