//! One chart over the steps. The curves are a drawing that stretches to the width of the page; the
//! labels are text around it, which keeps its size.

use std::fmt::Write;

use super::series::{Scale, drawable, thin_out};

/// Width and height of a drawing, in its own units.
pub(super) const SIZE: (f64, f64) = (1000.0, 300.0);

/// How a curve looks: a class of report.css.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// A thin, faint line.
    Faint,
    /// A line.
    Strong,
    /// Points on a thin line.
    Points,
}

impl Look {
    fn class(self) -> &'static str {
        match self {
            Self::Faint => "faint",
            Self::Strong => "strong",
            Self::Points => "points",
        }
    }
}

/// Values at some of the steps.
#[derive(Debug)]
pub(super) struct Curve {
    /// Its name in the legend.
    pub(super) name: String,
    /// Its look.
    pub(super) look: Look,
    /// Steps, rising.
    pub(super) steps: Vec<u64>,
    /// A value for each step.
    pub(super) values: Vec<f64>,
}

impl Curve {
    fn points(&self) -> impl Iterator<Item = (u64, f64)> {
        self.steps.iter().copied().zip(self.values.iter().copied())
    }

    /// The same curve of fewer points.
    fn thinned_out(&self) -> Vec<(u64, f64)> {
        let kept = thin_out(&self.values);
        kept.iter().filter_map(|&i| Some((*self.steps.get(i)?, *self.values.get(i)?))).collect()
    }
}

/// A chart.
#[derive(Debug)]
pub(super) struct Chart<'a> {
    /// Its title.
    pub(super) title: &'a str,
    /// Its unit, if it has one.
    pub(super) unit: &'a str,
    /// Whether the axis includes 0.
    pub(super) from_zero: bool,
    /// From the back to the front.
    pub(super) curves: Vec<Curve>,
    /// A dashed line at this value, and its name.
    pub(super) limit: Option<(f64, String)>,
}

impl Chart<'_> {
    /// The chart as an HTML figure.
    pub(super) fn render(&self) -> String {
        let values = self.curves.iter().flat_map(|c| &c.values).copied();
        let y = Scale::around(values, self.from_zero);
        let steps = || self.curves.iter().flat_map(|c| c.steps.iter().copied());
        let x = Scale::steps(steps().min().unwrap_or(0), steps().max().unwrap_or(0));
        let (title, unit) = (self.title, self.unit);
        let scale = if y.logarithmic { "logarithmic scale" } else { "" };
        let notes: Vec<&str> = [unit, scale].into_iter().filter(|note| !note.is_empty()).collect();
        let caption = format!("<b>{title}</b> <span>{}</span>", notes.join(", "));
        let (legend, labels, drawing) = (self.legend(), axes(&x, &y), self.drawing(&x, &y));
        let (absent, data) = (self.absent(), self.data(&x, &y));
        format!(
            "<figure class=\"chart\" data-curves='{data}'>\n<figcaption>{caption}{legend}{absent}</figcaption>\n\
             <div class=\"plot\">{labels}{drawing}</div>\n<p class=\"xname\">Step</p>\n</figure>\n"
        )
    }

    /// The names of the curves, if there are several.
    fn legend(&self) -> String {
        if self.curves.len() == 1 && self.limit.is_none() {
            return String::new();
        }
        let key = |class: &str, name: &str| format!("<span class=\"key {class}\">{name}</span>");
        let mut keys: Vec<String> = self.curves.iter().map(|c| key(c.look.class(), &c.name)).collect();
        keys.extend(self.limit.iter().map(|(_, name)| key("limit", name)));
        format!("<span class=\"legend\">{}</span>", keys.concat())
    }

    /// The drawing: lines of the grid, the limit if it lies on the scale, the curves.
    fn drawing(&self, x: &Scale, y: &Scale) -> String {
        let (width, height) = SIZE;
        let mut inside = String::new();
        let horizontal = |class: &str, at: f64| {
            let at = round((1.0 - y.place(at)) * height);
            format!("<path class=\"{class}\" d=\"M0 {at}H{width}\"/>")
        };
        inside.extend(y.ticks.iter().map(|&tick| horizontal("grid", tick)));
        let shown = self.limit.iter().filter(|(at, _)| y.covers(*at));
        inside.extend(shown.map(|(at, _)| horizontal("limit", *at)));
        for curve in &self.curves {
            inside.push_str(&path(curve, x, y));
        }
        let label = format!("{} over the steps", self.title);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" preserveAspectRatio=\"none\" \
             role=\"img\" aria-label=\"{label}\">{inside}</svg>"
        )
    }

    /// The number of values that cannot be drawn.
    fn absent(&self) -> String {
        let Some(curve) = self.curves.iter().find(|c| c.look != Look::Strong || self.curves.len() == 1) else {
            return String::new();
        };
        let absent: Vec<u64> = curve.points().filter(|p| !drawable(p.1)).map(|p| p.0).collect();
        let Some(first) = absent.first() else { return String::new() };
        let count = absent.len();
        let steps = if count == 1 { "step has a value" } else { "steps have values" };
        format!(
            "<span class=\"absent\">{count} {steps} that cannot be drawn (not a finite number); the first is step {first}.</span>"
        )
    }

    /// The data of the script that shows values: `[name, class, [[x, y, step, value], ..]]` for
    /// each curve, x and y in thousandths of the drawing. Names have no quotes, so nothing is
    /// escaped.
    fn data(&self, x: &Scale, y: &Scale) -> String {
        let point = |(step, value): (u64, f64)| {
            let (x, y) = (x.place(step as f64) * 1000.0, (1.0 - y.place(value)) * 1000.0);
            format!("[{x:.0},{y:.0},{step},\"{}\"]", significant(value))
        };
        let curve = |c: &Curve| {
            let points: Vec<String> = c.thinned_out().into_iter().filter(|p| drawable(p.1)).map(point).collect();
            format!("[\"{}\",\"{}\",[{}]]", c.name, c.look.class(), points.join(","))
        };
        format!("[{}]", self.curves.iter().map(curve).collect::<Vec<_>>().join(","))
    }
}

/// The labels of both axes, placed in percent.
fn axes(x: &Scale, y: &Scale) -> String {
    let mut labels = String::from("<div class=\"y\">");
    let step = y.ticks.windows(2).find_map(|w| Some(w.get(1)? - w.first()?)).unwrap_or(1.0);
    for &tick in &y.ticks {
        let label = if y.logarithmic { power_of_ten(tick) } else { tick_label(tick, step, y) };
        let _ = write!(labels, "<span style=\"top:{}%\">{label}</span>", round((1.0 - y.place(tick)) * 100.0));
    }
    labels.push_str("</div><div class=\"x\">");
    for &tick in &x.ticks {
        let _ = write!(labels, "<span style=\"left:{}%\">{}</span>", round(x.place(tick) * 100.0), grouped(tick, 0));
    }
    labels + "</div>"
}

/// A curve as a path with gaps at values that cannot be drawn. A single point is a line without
/// length: with round ends it is a dot, however the drawing is stretched.
fn path(curve: &Curve, x: &Scale, y: &Scale) -> String {
    let (width, height) = SIZE;
    let (mut line, mut dots, mut pen_down) = (String::new(), String::new(), false);
    let points = curve.thinned_out();
    for (i, &(step, value)) in points.iter().enumerate() {
        if !drawable(value) {
            pen_down = false;
            continue;
        }
        let (px, py) = (round(x.place(step as f64) * width), round((1.0 - y.place(value)) * height));
        let _ = write!(line, "{}{px} {py}", if pen_down { "L" } else { "M" });
        let alone = !pen_down && !points.get(i + 1).is_some_and(|next| drawable(next.1));
        if alone || curve.look == Look::Points {
            let _ = write!(dots, "M{px} {py}h0");
        }
        pen_down = true;
    }
    let class = curve.look.class();
    let dots = if dots.is_empty() { dots } else { format!("<path class=\"{class} dots\" d=\"{dots}\"/>") };
    format!("<path class=\"{class}\" d=\"{line}\"/>{dots}")
}

/// Rounds to a tenth of a unit of the drawing, which is not visible.
fn round(x: f64) -> f64 {
    (x * 10.0).round() / 10.0
}

/// A label with the digits that the distance of labels needs.
fn tick_label(tick: f64, step: f64, scale: &Scale) -> String {
    let largest = scale.ticks.iter().fold(0.0_f64, |m, t| m.max(t.abs()));
    let digits = |unit: f64| (0..6).find(|&d| ((step / unit) * 10_f64.powi(d)).fract().abs() < 1e-6).unwrap_or(6) as usize;
    if tick == 0.0 {
        return "0".to_owned();
    }
    if (1e-3..1e6).contains(&largest) {
        return grouped(tick, (0..9).find(|&d| is_whole(step * 10_f64.powi(d))).unwrap_or(9) as usize);
    }
    let exponent = tick.abs().log10().floor() as i32;
    format!("{tick:.*e}", digits(10_f64.powi(exponent)))
}

fn is_whole(x: f64) -> bool {
    (x - x.round()).abs() < 1e-6 * x.abs()
}

fn power_of_ten(x: f64) -> String {
    let exponent = x.log10().round() as i32;
    match exponent {
        -3..=-1 => format!("{x:.*}", exponent.unsigned_abs() as usize),
        0..=5 => grouped(x, 0),
        _ => format!("1e{exponent}"),
    }
}

/// A number with commas between thousands.
pub(super) fn grouped(x: f64, decimals: usize) -> String {
    let text = format!("{:.decimals$}", x.abs());
    let (whole, fraction) = text.split_once('.').map_or((text.as_str(), ""), |(w, f)| (w, f));
    let mut out = String::from(if x < 0.0 { "−" } else { "" });
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    if fraction.is_empty() { out } else { out + "." + fraction }
}

/// A number to four significant digits.
pub(super) fn significant(x: f64) -> String {
    let size = x.abs();
    if !x.is_finite() {
        "not finite".to_owned()
    } else if x == 0.0 {
        "0".to_owned()
    } else if (1e-3..1e7).contains(&size) {
        grouped(x, (3 - size.log10().floor() as i32).max(0) as usize)
    } else {
        format!("{x:.3e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([1.23456, 0.0123456, 1234567.0, -45.678].map(significant), ["1.235", "0.01235", "1,234,567", "−45.68"]);
        assert_eq!([2e-4, 1e9, 0.0, f64::NAN].map(significant), ["2.000e-4", "1.000e9", "0", "not finite"]);
        assert_eq!([0.0, 999.0, 1000.0, 1234567.5].map(|x| grouped(x, 0)), ["0", "999", "1,000", "1,234,568"]);
    }

    #[test]
    fn ticks_have_the_digits_they_need() {
        let labels = |low: f64, high: f64| {
            let scale = Scale::around([low, high].into_iter(), true);
            let step = scale.ticks[1] - scale.ticks[0];
            scale.ticks.iter().map(|&t| tick_label(t, step, &scale)).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(labels(0.0, 2e-4), "0 5e-5 1.0e-4 1.5e-4 2.0e-4");
        assert_eq!(labels(0.0, 1.25), "0 0.25 0.50 0.75 1.00 1.25");
        assert_eq!(labels(0.0, 9_000.0), "0 2,000 4,000 6,000 8,000 10,000");
        assert_eq!([0.001, 0.1, 1.0, 1000.0, 1e6, 1e-5].map(power_of_ten), ["0.001", "0.1", "1", "1,000", "1e6", "1e-5"]);
    }
}
