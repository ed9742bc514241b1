//! What a promised response time takes: the bound of a G/G/1 queue (Sandpiper, gray box).
//!
//! ```text
//!   λ_cap ≥ 1 / ( s + (σ_a² + σ_b²) / (2·(d − s)) )
//! ```
//!
//! A server that takes s for a request (variance σ_b²), with times between requests of variance σ_a², answers within d on
//! average as long as no more than λ_cap requests come a second. Which λ are expected, divided by that, is by how much the
//! guest's share of processors must grow. A guest that can do nothing in less time than it was promised needs more than
//! any share: the scale is infinite then.

use crate::model::GrayBox;

/// Requests a second that are answered in the time that was promised; 0 if one alone takes longer. None if nothing was
/// promised or the figures cannot be.
#[must_use]
pub fn capacity_per_s(gray_box: &GrayBox) -> Option<f64> {
    let GrayBox { service_s, arrival_variance_s2, service_variance_s2, .. } = *gray_box;
    let promised_s = gray_box.promised_response_s;
    let figures = [service_s, arrival_variance_s2, service_variance_s2, promised_s];
    if figures.iter().any(|figure| !figure.is_finite() || *figure < 0.0) || promised_s == 0.0 {
        return None;
    }
    if promised_s <= service_s {
        return Some(0.0);
    }
    let wait_s = (arrival_variance_s2 + service_variance_s2) / (2.0 * (promised_s - service_s));
    let capacity_per_s = 1.0 / (service_s + wait_s);
    capacity_per_s.is_finite().then_some(capacity_per_s)
}

/// By what a guest's share of processors is to be multiplied for so many requests a second; infinite if none is enough.
/// None if that cannot be said.
#[must_use]
pub fn scale(gray_box: &GrayBox, requests_per_s: f64) -> Option<f64> {
    let capacity_per_s = capacity_per_s(gray_box)?;
    if !requests_per_s.is_finite() || requests_per_s <= 0.0 {
        return None;
    }
    Some(if capacity_per_s > 0.0 { requests_per_s / capacity_per_s } else { f64::INFINITY })
}
