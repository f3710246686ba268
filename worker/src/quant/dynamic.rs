//! The signed dynamic 8-bit code in which bitsandbytes stores the scales of NF4 blocks.
//!
//! Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022), section 1.3; bitsandbytes 0.50,
//! `functional.create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)`.

/// Decimal magnitudes of the code, smallest first; the one at index `e` has `2^e` values of each sign.
const MAGNITUDES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];

/// Computes the code: for each magnitude, the midpoints of equal steps from a tenth of it to it, in both signs; then 0
/// and 1. Sorted upwards.
#[must_use]
pub fn dynamic_map() -> [f32; 256] {
    let mut values = vec![0.0f32, 1.0];
    for (exponent, magnitude) in MAGNITUDES.into_iter().enumerate() {
        let steps = 1usize << exponent;
        let edge = |i| linspace(0.1, 1.0, steps, i);
        for i in 0..steps {
            let midpoint = (edge(i) + edge(i + 1)) / 2.0;
            values.extend([magnitude * midpoint, -(magnitude * midpoint)]);
        }
    }
    values.sort_by(f32::total_cmp);
    values.try_into().expect("2 and twice 127 values")
}

/// Gives point `i` of an even division into `steps`, as PyTorch's `linspace` does on a processor with fused
/// multiply-add: from the nearer end, in f32, rounded once. The last bits of the published code depend on it.
fn linspace(start: f32, end: f32, steps: usize, i: usize) -> f32 {
    let step = (end - start) / steps as f32;
    let points = steps + 1;
    if i < points / 2 { step.mul_add(i as f32, start) } else { (-step).mul_add((steps - i) as f32, end) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_sorted_distinct_and_nearly_symmetric() {
        let map = dynamic_map();
        assert!(map.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!((map[127], map[255]), (0.0, 1.0));
        for i in 1..=127 {
            assert_eq!(map[127 - i], -map[127 + i], "{i}");
        }
    }
}
