//! `--svg`: overload-seconds of each policy as bars with a dot a seed; below, overloaded hosts over time.

use std::fmt::Write as _;

use super::kept::Kept;

const WIDTH: f64 = 800.0;
const LEFT: f64 = 110.0;
const PLOT: f64 = 560.0;
const TOP: f64 = 60.0;
const ROW: f64 = 32.0;
const HEIGHT: f64 = 260.0;

/// Points of a line at most: more cannot be seen.
const POINTS_MAX: usize = 280;

const COLOURS: [&str; 7] =
    ["#8a8f98", "#c26a2d", "#5f9e4f", "#a14d8b", "#b3a125", "#4fa3a0", "#6d7fd6"];

/// Godwit's own.
const OURS: &str = "#1b6ca8";

fn colour(at: usize, name: &str) -> &'static str {
    if name == "godwit" { OURS } else { COLOURS.get(at % COLOURS.len()).copied().unwrap_or(OURS) }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A round number at or above the largest value, and the step to it.
fn axis(largest: f64) -> (f64, f64) {
    let largest = if largest.is_finite() && largest > 0.0 { largest } else { 1.0 };
    let power = 10_f64.powf((largest / 5.0).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    let step = steps.into_iter().find(|step| step * 5.0 >= largest).unwrap_or(10.0 * power);
    ((largest / step).ceil() * step, step)
}

/// The file's text.
pub(super) fn plot(about: &str, names: &[String], runs: &[Kept], report_s: f64) -> String {
    let bars_bottom = TOP + ROW * names.len() as f64;
    let lines_top = bars_bottom + 90.0;
    let height = lines_top + HEIGHT + 60.0;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"22\" font-size=\"16\" font-weight=\"bold\">{}</text>\n\
         <text x=\"12\" y=\"42\">Overload, host-seconds: mean, and each seed</text>\n\
         <text x=\"12\" y=\"{}\">Overloaded hosts over time, first seed, mean of some minutes</text>\n",
        escape(about),
        lines_top - 18.0
    );
    bars(&mut text, names, runs, bars_bottom);
    lines(&mut text, names, runs, report_s, lines_top);
    text.push_str("</svg>\n");
    text
}

/// Ticks below a plot.
fn across(text: &mut String, (high, step): (f64, f64), top: f64, bottom: f64) {
    let mut at = 0.0;
    while at <= high * 1.001 {
        let x = LEFT + PLOT * at / high;
        // Writing to a String does not fail, here and below.
        let _ = writeln!(
            text,
            "<line x1=\"{x:.1}\" y1=\"{top}\" x2=\"{x:.1}\" y2=\"{bottom}\" stroke=\"#dddddd\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#444444\">{at}</text>",
            bottom + 17.0
        );
        at += step;
    }
}

fn bars(text: &mut String, names: &[String], runs: &[Kept], bottom: f64) {
    let axis = axis(runs.iter().map(|run| run.overload_s).fold(0.0, f64::max));
    across(text, axis, TOP, bottom);
    for (at, name) in names.iter().enumerate() {
        let values: Vec<f64> =
            runs.iter().filter(|run| run.policy == *name).map(|run| run.overload_s).collect();
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        let middle = TOP + ROW * (at as f64 + 0.5);
        let x = |value: f64| LEFT + PLOT * value / axis.0;
        let _ = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"20\" fill=\"{}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{mean:.0}</text>",
            LEFT - 8.0,
            middle + 4.5,
            escape(name),
            middle - 10.0,
            x(mean) - LEFT,
            colour(at, name),
            x(values.iter().copied().fold(mean, f64::max)) + 8.0,
            middle + 4.5
        );
        for value in values {
            let _ = writeln!(
                text,
                "<circle cx=\"{:.1}\" cy=\"{middle:.1}\" r=\"2.5\" fill=\"#222222\" fill-opacity=\"0.5\"/>",
                x(value)
            );
        }
    }
}

fn lines(text: &mut String, names: &[String], runs: &[Kept], report_s: f64, top: f64) {
    let has_course =
        |run: &&Kept, name: &String| run.policy == *name && !run.overloaded_hosts.is_empty();
    let first = |name: &String| runs.iter().find(|run| has_course(run, name));
    let smooth: Vec<Vec<(f64, f64)>> = names
        .iter()
        .map(|name| first(name).map_or(vec![], |run| thin(&run.overloaded_hosts, report_s)))
        .collect();
    let points = || smooth.iter().flatten();
    let right = axis(points().map(|point| point.0).fold(0.0, f64::max));
    let up = axis(points().map(|point| point.1).fold(0.0, f64::max));
    across(text, right, top, top + HEIGHT);
    let mut at = 0.0;
    while at <= up.0 * 1.001 {
        let y = top + HEIGHT * (1.0 - at / up.0);
        let _ = writeln!(
            text,
            "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{:.1}\" y2=\"{y:.1}\" stroke=\"#dddddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#444444\">{at}</text>",
            LEFT + PLOT,
            LEFT - 8.0,
            y + 4.5
        );
        at += up.1;
    }
    for (at, (name, points)) in names.iter().zip(&smooth).enumerate() {
        let place = |(x, y): &(f64, f64)| {
            format!("{:.1},{:.1}", LEFT + PLOT * x / right.0, top + HEIGHT * (1.0 - y / up.0))
        };
        let points: Vec<String> = points.iter().map(place).collect();
        let colour = colour(at, name);
        let _ = writeln!(
            text,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{}</text>",
            points.join(" "),
            LEFT + PLOT + 10.0,
            top + 14.0 + 18.0 * at as f64,
            escape(name)
        );
    }
    let _ = writeln!(
        text,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">seconds</text>",
        LEFT + PLOT / 2.0,
        top + HEIGHT + 40.0
    );
}

/// Means of so many intervals that the points can be told apart.
fn thin(values: &[f64], report_s: f64) -> Vec<(f64, f64)> {
    let group = values.len().div_ceil(POINTS_MAX).max(1);
    let mean = |(at, chunk): (usize, &[f64])| {
        let middle = (at * group) as f64 + chunk.len() as f64 / 2.0;
        (middle * report_s, chunk.iter().sum::<f64>() / chunk.len().max(1) as f64)
    };
    values.chunks(group).enumerate().map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_round_and_lines_thin() {
        assert_eq!(axis(9.0), (10.0, 2.0));
        assert_eq!(axis(0.0).0, 1.0);
        assert_eq!(axis(f64::INFINITY).0, 1.0);
        let values: Vec<f64> = (0..5000).map(f64::from).collect();
        let points = thin(&values, 10.0);
        assert!(points.len() <= POINTS_MAX && points.len() > POINTS_MAX / 2);
        assert_eq!(thin(&[3.0, 5.0], 10.0), [(5.0, 3.0), (15.0, 5.0)]);
    }

    #[test]
    fn a_plot_without_runs_is_a_plot() {
        let text = plot("a < b", &["none".into()], &[], 10.0);
        assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"));
        assert!(text.contains("a &lt; b") && !text.contains("NaN") && !text.contains("inf"));
    }
}
