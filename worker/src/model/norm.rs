//! RMSNorm: `y = x / sqrt(mean(x^2) + epsilon) * weight`.
//!
//! Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; gpt-oss computes it in f32.

/// Normalises each row of a batch.
///
/// Shapes: x: [batch, size], weight: [size], out: [batch, size]. Sums are f64, in eight lanes by element, so that an
/// addition need not wait for the one before.
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let size = weight.len();
    for (row, normalised) in x.chunks_exact(size).zip(out.chunks_exact_mut(size)) {
        let sum = sum_of_squares(row);
        let scale = (1.0 / (sum / size as f64 + f64::from(epsilon)).sqrt()) as f32;
        for ((y, value), factor) in normalised.iter_mut().zip(row).zip(weight) {
            *y = value * scale * factor;
        }
    }
}

fn sum_of_squares(values: &[f32]) -> f64 {
    let (chunks, rest) = values.as_chunks::<8>();
    let mut lanes = [0.0f64; 8];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*value) * f64::from(*value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(*value) * f64::from(*value);
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

#[cfg(test)]
mod tests {
    use super::rms_norm;

    #[test]
    fn a_row_comes_out_with_unit_mean_square_times_the_weight() {
        let mut out = [0.0; 4];
        rms_norm(&[3.0, -4.0, 30.0, -40.0], &[1.0, 2.0], 0.0, &mut out);
        let root = 12.5f32.sqrt();
        for (got, expected) in out.iter().zip([3.0 / root, -8.0 / root, 3.0 / root, -8.0 / root]) {
            assert!((got - expected).abs() < 1e-6, "{got} instead of {expected}");
        }
    }

    #[test]
    fn epsilon_keeps_a_row_of_zeros_finite() {
        let mut out = [1.0; 2];
        rms_norm(&[0.0, 0.0], &[1.0, 1.0], 1e-5, &mut out);
        assert_eq!(out, [0.0, 0.0]);
    }
}
