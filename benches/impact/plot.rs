//! The two plots, as SVG by hand: points with labels, and lines with labels. Readable on white and on dark pages, as
//! they bring their own white ground.

use std::fmt::Write;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 540.0;
const LEFT: f64 = 76.0;
const TOP: f64 = 48.0;
const BOTTOM: f64 = 58.0;
/// Right of the points there is only room for the last tick; right of the lines stand their labels.
const RIGHT_OF_POINTS: f64 = 36.0;
const RIGHT_OF_LINES: f64 = 230.0;

/// What a character of a label takes at most, on the average, and how high a line of text is, at 12 px.
const CHARACTER: f64 = 6.9;
const LINE: f64 = 16.0;

/// Told apart by people who see colours differently, too; lines differ in their dashes as well.
const COLOURS: [&str; 8] = ["#0072b2", "#c84e00", "#00805d", "#b5427f", "#2a8fc4", "#8a6500", "#7b3fa0", "#333333"];
const DASHES: [&str; 3] = ["", "7 3", "2 3"];

/// A backlog of nothing has no place on a logarithmic axis. It is drawn here, in per cent.
const FLOOR: f64 = 0.1;

#[derive(Clone, Copy, PartialEq)]
pub enum Scale {
    Linear,
    Log,
}

pub struct Axis {
    pub title: &'static str,
    pub scale: Scale,
}

pub struct Point<'a> {
    pub label: &'a str,
    pub x: f64,
    pub y: f64,
}

pub struct Line<'a> {
    pub label: &'a str,
    pub points: Vec<(f64, f64)>,
    /// Grey, as what the others are compared with.
    pub plain: bool,
}

/// An axis with its ends chosen, from value to pixel.
struct Range {
    scale: Scale,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Range {
    /// With some room on both sides of the values.
    fn over(values: impl Iterator<Item = f64>, scale: Scale, from: f64, to: f64) -> Self {
        let (low, high) = values.fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        let (low, high) = match scale {
            Scale::Log => (step_below(low / 1.3), step_above(high * 1.3)),
            Scale::Linear => (0.0_f64.min(low), (high * 1.1).max(0.01)),
        };
        Self { scale, low, high, from, to }
    }

    fn place(&self, value: f64) -> f64 {
        let share = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
        };
        self.from + share * (self.to - self.from)
    }

    fn ticks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Log => {
                let mut ticks = vec![self.low];
                while let Some(next) = ticks.last().map(|t| step_above(t * 1.01)).filter(|t| *t <= self.high * 1.01) {
                    ticks.push(next);
                }
                ticks
            }
            Scale::Linear => {
                let step = step_above((self.high - self.low) / 10.0);
                let first = (self.low / step).ceil();
                (0..).map(|i| (first + f64::from(i)) * step).take_while(|t| *t <= self.high).collect()
            }
        }
    }
}

/// The steps are 1, 2 and 5 times the powers of ten.
fn step_below(value: f64) -> f64 {
    let decade = 10_f64.powf(value.log10().floor());
    [5.0, 2.0, 1.0].map(|s| s * decade).into_iter().find(|s| *s <= value * 1.000_001).unwrap_or(decade)
}

fn step_above(value: f64) -> f64 {
    let decade = 10_f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0].map(|s| s * decade).into_iter().find(|s| *s >= value * 0.999_999).unwrap_or(10.0 * decade)
}

/// 0.1, 20, 5000: no more digits than it has.
fn number(value: f64) -> String {
    let digits = if value.abs() >= 1.0 || value == 0.0 { 1 } else { 3 };
    let text = format!("{value:.digits$}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, more: &str, text: &str) {
    let text = escape(text);
    let _ = writeln!(svg, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" {more}>{text}</text>"#);
}

/// Ground, title, axes and their grid.
fn frame(title: &str, x_axis: &Axis, y_axis: &Axis, x: &Range, y: &Range) -> String {
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222222">
<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>
"##
    );
    let (left, right, top, bottom) = (x.from, x.to, y.to, y.from);
    text(&mut svg, (left, 26.0), "start", r#"font-size="15" font-weight="bold""#, title);
    for tick in x.ticks() {
        let at = x.place(tick);
        let _ = writeln!(svg, r##"<path d="M{at:.1} {top}V{bottom}" stroke="#e4e4e4"/>"##);
        text(&mut svg, (at, bottom + 18.0), "middle", "", &number(tick));
    }
    for tick in y.ticks() {
        let at = y.place(tick);
        let _ = writeln!(svg, r##"<path d="M{left} {at:.1}H{right}" stroke="#e4e4e4"/>"##);
        text(&mut svg, (left - 8.0, at + 4.0), "end", "", &number(tick));
    }
    let _ = writeln!(svg, r##"<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#222222"/>"##);
    let of = |axis: &Axis| format!("{}{}", axis.title, if axis.scale == Scale::Log { " (log)" } else { "" });
    text(&mut svg, (f64::midpoint(left, right), HEIGHT - 14.0), "middle", "", &of(x_axis));
    let middle = f64::midpoint(top, bottom);
    text(&mut svg, (20.0, middle), "middle", &format!(r#"transform="rotate(-90 20 {middle:.1})""#), &of(y_axis));
    svg
}

/// A box on the page: left, top, right, bottom.
type Rect = [f64; 4];

fn overlap(a: &Rect, b: &Rect) -> bool {
    a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]
}

/// Points, each with its label where there is room for it. `level` is a line across, such as what no sweep has.
pub fn scatter(title: &str, x_axis: &Axis, y_axis: &Axis, points: &[Point<'_>], level: Option<(&str, f64)>) -> String {
    if points.is_empty() {
        return String::new();
    }
    let level_y = level.map(|(_, y)| y);
    let x = Range::over(points.iter().map(|p| p.x), x_axis.scale, LEFT, WIDTH - RIGHT_OF_POINTS);
    let y = Range::over(points.iter().map(|p| p.y).chain(level_y), y_axis.scale, HEIGHT - BOTTOM, TOP);
    let mut svg = frame(title, x_axis, y_axis, &x, &y);
    let mut taken: Vec<Rect> = Vec::new();
    if let Some((label, value)) = level {
        let at = y.place(value);
        let _ = writeln!(svg, r##"<path d="M{} {at:.1}H{}" stroke="#777777" stroke-dasharray="6 4"/>"##, x.from, x.to);
        text(&mut svg, (x.to - 6.0, at - 6.0), "end", r##"fill="#555555""##, label);
        let width = label.len() as f64 * CHARACTER;
        taken.push([x.to - 6.0 - width, at - 6.0 - LINE, x.to, at]);
        taken.push([x.from, at - 2.0, x.to, at + 2.0]);
    }
    let places: Vec<(f64, f64)> = points.iter().map(|p| (x.place(p.x), y.place(p.y))).collect();
    taken.extend(places.iter().map(|(x, y)| [x - 7.0, y - 7.0, x + 7.0, y + 7.0]));
    for (i, (point, (px, py))) in points.iter().zip(&places).enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let width = point.label.len() as f64 * CHARACTER;
        // Right, left, then further and further above and below on both sides.
        let candidates = (0..24).flat_map(|far| [f64::from(far) * LINE * 0.75, f64::from(far) * LINE * -0.75]);
        let candidates = candidates.flat_map(|dy| {
            [[px + 11.0, py + dy - LINE / 2.0], [px - 11.0 - width, py + dy - LINE / 2.0]]
                .map(|[left, top]| [left, top, left + width, top + LINE])
        });
        let inside = |r: &Rect| r[0] > x.from && r[2] < WIDTH - 4.0 && r[1] > y.to && r[3] < y.from;
        let free = candidates.clone().find(|r| inside(r) && !taken.iter().any(|t| overlap(r, t)));
        let label = free.or_else(|| candidates.clone().find(inside)).unwrap_or([px + 11.0, *py, px + width, py + LINE]);
        let (near, middle) = (if label[0] > *px { label[0] } else { label[2] }, f64::midpoint(label[1], label[3]));
        if (middle - py).abs() > LINE {
            let _ = writeln!(svg, r#"<path d="M{px:.1} {py:.1}L{near:.1} {middle:.1}" stroke="{colour}"/>"#);
        }
        // The program that this is about stands out.
        let (radius, weight) = if point.label.starts_with("ttlsweep") { (7, "bold") } else { (5, "normal") };
        let _ = writeln!(svg, r#"<circle cx="{px:.1}" cy="{py:.1}" r="{radius}" fill="{colour}"/>"#);
        let style = format!(r#"fill="{colour}" font-weight="{weight}""#);
        text(&mut svg, (label[0], middle + 4.0), "start", &style, point.label);
        taken.push(label);
    }
    svg + "</svg>\n"
}

/// Lines, each with its label behind its end; the labels are pushed apart where the ends lie close together.
pub fn lines(title: &str, x_axis: &Axis, y_axis: &Axis, lines: &[Line<'_>]) -> String {
    let lines: Vec<&Line<'_>> = lines.iter().filter(|l| !l.points.is_empty()).collect();
    if lines.is_empty() {
        return String::new();
    }
    let all = || lines.iter().flat_map(|l| l.points.iter());
    let mut x = Range::over(all().map(|p| p.0), x_axis.scale, LEFT, WIDTH - RIGHT_OF_LINES);
    x.high = all().map(|p| p.0).fold(f64::MIN, f64::max);
    let y = Range::over(all().map(|p| p.1.max(FLOOR)), y_axis.scale, HEIGHT - BOTTOM, TOP);
    let mut svg = frame(title, x_axis, y_axis, &x, &y);
    if x.low < 0.0 {
        let at = x.place(0.0);
        let _ = writeln!(svg, r##"<path d="M{at:.1} {}V{}" stroke="#777777" stroke-dasharray="6 4"/>"##, y.to, y.from);
        text(&mut svg, (at + 5.0, y.to + 13.0), "start", r##"fill="#555555""##, "the sweep begins");
    }
    let mut ends: Vec<(f64, usize)> = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        let path: Vec<String> =
            line.points.iter().map(|p| format!("{:.1} {:.1}", x.place(p.0), y.place(p.1.max(FLOOR)))).collect();
        let (colour, dashes, width) = style(line, i);
        let path = path.join("L");
        let _ = writeln!(
            svg,
            r#"<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}"/>"#
        );
        ends.push((y.place(line.points[line.points.len() - 1].1.max(FLOOR)), i));
    }
    ends.sort_by(|a, b| a.0.total_cmp(&b.0));
    // Down from the top, then up again from the bottom where they ran out of the page.
    let mut at: Vec<f64> = ends.iter().map(|e| e.0).collect();
    for i in 1..at.len() {
        at[i] = at[i].max(at[i - 1] + LINE);
    }
    let mut limit = y.from;
    for at in at.iter_mut().rev() {
        *at = at.min(limit);
        limit = *at - LINE;
    }
    for ((end, i), at) in ends.iter().zip(&at) {
        let (colour, dashes, width) = style(lines[*i], *i);
        let to = x.to + 14.0;
        let _ =
            writeln!(svg, r#"<path d="M{:.1} {end:.1}L{to:.1} {at:.1}" stroke="{colour}" opacity="0.6"/>"#, x.to + 1.0);
        let _ = writeln!(
            svg,
            r#"<path d="M{to:.1} {at:.1}h20" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}"/>"#
        );
        text(&mut svg, (to + 25.0, at + 4.0), "start", &format!(r#"fill="{colour}""#), lines[*i].label);
    }
    svg + "</svg>\n"
}

/// Colour, dashes, width.
fn style(line: &Line<'_>, i: usize) -> (&'static str, &'static str, f64) {
    if line.plain {
        return ("#777777", DASHES[1], 2.0);
    }
    let ours = line.label.starts_with("ttlsweep");
    (COLOURS[i % COLOURS.len()], if ours { "" } else { DASHES[i % DASHES.len()] }, if ours { 3.0 } else { 1.8 })
}
