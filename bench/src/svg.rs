//! Plots as SVG: horizontal bars with every run as a dot, distributions on a logarithmic axis, and
//! lines over time.
//!
//! ```text
//!        title
//!  godwit   |#######o-o|            61.5
//!  pre-copy |##########o---o|       98.1
//!           0    50   100   150
//!              outage in ms
//! ```

use std::fmt::Write as _;

use crate::stats::Span;
use crate::table::number;

const WIDTH: f64 = 760.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 110.0;
const TOP: f64 = 46.0;
const BOTTOM: f64 = 52.0;
const ROW: f64 = 34.0;
const PLOT: f64 = WIDTH - LEFT - RIGHT;

/// Height of the area of a plot over time.
const HEIGHT: f64 = 260.0;

/// Colours of lines that are not ours.
const PALETTE: [&str; 6] = ["#8a8f98", "#c26a2d", "#5f9e4f", "#a14d8b", "#b3a125", "#4fa3a0"];

/// Colours of further lines of ours.
const OUR_PALETTE: [&str; 5] = ["#1b6ca8", "#5ba3d9", "#0b3d63", "#2fb3c6", "#6d7fd6"];

/// Colours: ours, and everything else.
const OURS: &str = "#1b6ca8";
const OTHERS: &str = "#8a8f98";

/// One row of a plot.
#[derive(Debug, Clone)]
pub(crate) struct Series {
    /// Name.
    pub(crate) label: String,
    /// Values, one a run.
    pub(crate) values: Vec<f64>,
    /// Drawn in the colour that stands out.
    pub(crate) ours: bool,
}

/// A line over time.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    /// Name.
    pub(crate) label: String,
    /// (x, y), in the order of x.
    pub(crate) points: Vec<(f64, f64)>,
    /// Drawn in a colour that stands out.
    pub(crate) ours: bool,
    /// Whether each point is a dot, too: where there are few.
    pub(crate) has_dots: bool,
}

/// An axis: where values lie, and its ticks.
#[derive(Debug)]
struct Axis {
    low: f64,
    high: f64,
    log: bool,
    ticks: Vec<f64>,
}

impl Axis {
    /// From 0 to a round number above the largest value.
    fn linear(largest: f64) -> Self {
        let largest = if largest > 0.0 { largest } else { 1.0 };
        let rough = largest / 5.0;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
        let step = step.into_iter().find(|step| *step >= rough).unwrap_or(power * 10.0);
        let count = (largest / step).ceil() as u32;
        let ticks = (0..=count).map(|at| f64::from(at) * step).collect();
        Self { low: 0.0, high: f64::from(count) * step, log: false, ticks }
    }

    /// From a power of ten below the smallest value to one above the largest.
    fn logarithmic(smallest: f64, largest: f64) -> Self {
        let low = smallest.max(1e-3).log10().floor();
        let high = largest.max(1e-3).log10().ceil().max(low + 1.0);
        let powers = (low as i32)..=(high as i32);
        let ticks = powers
            .flat_map(|power| [1.0, 2.0, 5.0].map(|factor| factor * 10_f64.powi(power)))
            .filter(|tick| *tick <= 10_f64.powf(high) * 1.001)
            .collect();
        Self { low, high, log: true, ticks }
    }

    /// Where a value lies between the ends, 0 to 1.
    fn share(&self, value: f64) -> f64 {
        let value = if self.log { value.max(1e-9).log10() } else { value };
        ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + PLOT * self.share(value)
    }

    /// Upwards, in a plot over time.
    fn y(&self, value: f64) -> f64 {
        TOP + HEIGHT * (1.0 - self.share(value))
    }
}

/// Text as it may stand in SVG and HTML.
pub(crate) fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('"', "&quot;")
}

/// A number on the axis, without needless places.
fn tick(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value}") }
}

/// Title, axis and grid down to `bottom`; what it shows is drawn by the caller.
fn frame(title: &str, axis_label: &str, axis: &Axis, bottom: f64) -> String {
    let height = bottom + BOTTOM;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"24\" font-size=\"16\" font-weight=\"bold\">{}</text>\n",
        escape(title)
    );
    for value in &axis.ticks {
        let x = axis.x(*value);
        // Writing to a String does not fail, here and below.
        let _ = writeln!(
            text,
            "<line x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{bottom}\" stroke=\"#dddddd\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#444444\">{}</text>",
            bottom + 17.0,
            tick(*value)
        );
    }
    let _ = writeln!(
        text,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
        LEFT + PLOT / 2.0,
        bottom + 40.0,
        escape(axis_label)
    );
    text
}

fn label(text: &mut String, series: &Series, middle: f64) {
    let _ = writeln!(
        text,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
        LEFT - 8.0,
        middle + 4.5,
        escape(&series.label)
    );
}

fn value_text(text: &mut String, x: f64, middle: f64, value: &str) {
    let _ = writeln!(
        text,
        "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"#222222\">{value}</text>",
        x + 9.0,
        middle + 4.5
    );
}

fn dots(text: &mut String, series: &Series, axis: &Axis, middle: f64, radius: f64) {
    for (at, value) in series.values.iter().enumerate() {
        // Spread a little, so that equal values can be told apart.
        let y = middle + [0.0, -4.0, 4.0, -8.0, 8.0].get(at % 5).copied().unwrap_or(0.0);
        let _ = writeln!(
            text,
            "<circle cx=\"{:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"#222222\" \
             fill-opacity=\"0.55\"/>",
            axis.x(*value)
        );
    }
}

fn colour(series: &Series) -> &'static str {
    if series.ours { OURS } else { OTHERS }
}

/// Bars up to the median, a line from the smallest to the largest, a dot a run.
pub(crate) fn bars(title: &str, axis_label: &str, rows: &[Series]) -> String {
    let all = rows.iter().flat_map(|series| series.values.iter().copied());
    let axis = Axis::linear(all.fold(0.0, f64::max));
    let mut text = frame(title, axis_label, &axis, TOP + ROW * rows.len() as f64);
    for (at, series) in rows.iter().enumerate() {
        let middle = TOP + ROW * (at as f64 + 0.5);
        label(&mut text, series, middle);
        let Some(span) = Span::of(series.values.iter().copied()) else {
            value_text(&mut text, LEFT, middle, "no run completed");
            continue;
        };
        let (low, high) = (axis.x(span.min), axis.x(span.max));
        let _ = writeln!(
            text,
            "<rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"22\" fill=\"{}\"/>\
             <line x1=\"{low:.1}\" y1=\"{middle:.1}\" x2=\"{high:.1}\" y2=\"{middle:.1}\" \
             stroke=\"#222222\" stroke-width=\"1.5\"/>",
            middle - 11.0,
            axis.x(span.median) - LEFT,
            colour(series)
        );
        dots(&mut text, series, &axis, middle, 2.5);
        value_text(&mut text, high, middle, &number(span.median));
    }
    text.push_str("</svg>\n");
    text
}

/// Every run as a dot on a logarithmic axis, the median as a stroke.
pub(crate) fn distribution(title: &str, axis_label: &str, rows: &[Series]) -> String {
    let all = || rows.iter().flat_map(|series| series.values.iter().copied());
    let axis = Axis::logarithmic(all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
    let mut text = frame(title, axis_label, &axis, TOP + ROW * rows.len() as f64);
    for (at, series) in rows.iter().enumerate() {
        let middle = TOP + ROW * (at as f64 + 0.5);
        label(&mut text, series, middle);
        let Some(span) = Span::of(series.values.iter().copied()) else {
            value_text(&mut text, LEFT, middle, "no run completed");
            continue;
        };
        let x = axis.x(span.median);
        let _ = writeln!(
            text,
            "<line x1=\"{x:.1}\" y1=\"{:.1}\" x2=\"{x:.1}\" y2=\"{:.1}\" stroke=\"{}\" \
             stroke-width=\"4\"/>",
            middle - 13.0,
            middle + 13.0,
            colour(series)
        );
        dots(&mut text, series, &axis, middle, 3.5);
        value_text(&mut text, axis.x(span.max), middle, &number(span.median));
    }
    text.push_str("</svg>\n");
    text
}

/// Lines over time, each named at the right.
pub(crate) fn lines(title: &str, labels: (&str, &str), lines: &[Line]) -> String {
    let all = || lines.iter().flat_map(|line| line.points.iter());
    let x = Axis::linear(all().map(|point| point.0).fold(0.0, f64::max));
    let y = Axis::linear(all().map(|point| point.1).fold(0.0, f64::max));
    let mut text = frame(title, labels.0, &x, TOP + HEIGHT);
    for value in &y.ticks {
        let at = y.y(*value);
        let _ = writeln!(
            text,
            "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\" stroke=\"#dddddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#444444\">{}</text>",
            LEFT + PLOT,
            LEFT - 8.0,
            at + 4.5,
            tick(*value)
        );
    }
    let _ = writeln!(
        text,
        "<text transform=\"translate(60 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        TOP + HEIGHT / 2.0,
        escape(labels.1)
    );
    let (mut ours, mut others) = (OUR_PALETTE.iter().cycle(), PALETTE.iter().cycle());
    for (at, line) in lines.iter().enumerate() {
        let colour = if line.ours { ours.next() } else { others.next() }.copied().unwrap_or(OTHERS);
        let points: Vec<String> = line
            .points
            .iter()
            .map(|(from, to)| format!("{:.1},{:.1}", x.x(*from), y.y(*to)))
            .collect();
        let legend = TOP + 14.0 + 18.0 * at as f64;
        let _ = writeln!(
            text,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\
             <text x=\"{:.1}\" y=\"{legend:.1}\" fill=\"{colour}\" font-size=\"11\">{}</text>",
            points.join(" "),
            LEFT + PLOT + 6.0,
            escape(&line.label)
        );
        for (from, to) in line.points.iter().filter(|_| line.has_dots) {
            let (x, y) = (x.x(*from), y.y(*to));
            let _ =
                writeln!(text, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\"/>");
        }
    }
    text.push_str("</svg>\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(values: &[f64]) -> Series {
        Series { label: "a<b".into(), values: values.to_vec(), ours: true }
    }

    #[test]
    fn axes_end_at_round_numbers_above_the_values() {
        for (largest, high) in [(0.7, 0.8), (9.0, 10.0), (61.0, 80.0), (4321.0, 5000.0)] {
            let axis = Axis::linear(largest);
            assert!((axis.high - high).abs() < 1e-9, "{largest}: {}", axis.high);
            assert!(axis.ticks.len() >= 4 && axis.ticks.len() <= 7);
        }
        assert_eq!(Axis::linear(0.0).high, 1.0);
        let axis = Axis::logarithmic(30.0, 900.0);
        assert_eq!((axis.low, axis.high), (1.0, 3.0));
        assert!(axis.x(100.0) > axis.x(50.0) && axis.x(1e9) <= LEFT + PLOT);
    }

    #[test]
    fn lines_run_from_left_to_right_and_up() {
        let points = || vec![(0.0, 0.0), (9.0, 4.0)];
        let line = |ours| Line { label: "a<b".into(), points: points(), ours, has_dots: ours };
        let text = lines("t", ("s", "MiB"), &[line(true), line(false)]);
        assert_eq!(text.matches("<polyline").count(), 2);
        assert_eq!(text.matches("<circle").count(), 2);
        assert!(text.contains("150.0,306.0 "), "{text}");
        assert!(text.contains(OURS) && text.contains(PALETTE[0]) && text.contains("a&lt;b"));
        let empty = lines("t", ("s", "MiB"), &[]);
        assert!(!empty.contains("NaN") && empty.ends_with("</svg>\n"));
    }

    #[test]
    fn plots_are_well_formed_and_have_a_dot_a_run() {
        let rows = [series(&[1.0, 2.0, 3.0]), series(&[])];
        for text in [bars("t", "ms", &rows), distribution("t", "ms", &rows)] {
            assert_eq!(text.matches("<circle").count(), 3);
            assert!(text.contains("a&lt;b") && text.contains("no run completed"));
            assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"));
            assert!(!text.contains("NaN") && !text.contains("inf"));
        }
    }
}
