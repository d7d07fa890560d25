// The function f(x) = x * sigmoid(z(x)) of gated activations.

override GELU: bool = false; // gelu by its approximation with tanh, else silu

// sigmoid(x) and sigmoid(-x). It takes no exponential of a positive number, which could overflow,
// and no difference of close numbers.
fn sigmoids(x: f32) -> vec2<f32> {
    let e = exp(-abs(x));
    let both = vec2(1.0, e) / (1.0 + e);
    return select(both.yx, both, x >= 0.0);
}

// z(x) and its derivative. Of gelu, the sigmoid is 0 or 1 far before the clamp.
fn argument(x: f32) -> vec2<f32> {
    if (!GELU) { return vec2(x, 1.0); }
    let bounded = clamp(x, -100.0, 100.0);
    let square = bounded * bounded;
    return 1.5957691216057308 * vec2(bounded * (1.0 + 0.044715 * square), 1.0 + 0.134145 * square);
}
