#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use super::chart::SIZE;
use super::series::MAX_POINTS;
use super::*;

fn step(step: u64, loss: f32, grad_norm: f32) -> Record {
    Record::Step(StepRecord {
        step,
        epoch: step as f64 / 100.0,
        loss,
        lr: 1e-4 / step as f64,
        grad_norm,
        clip: 1.0,
        loss_tokens: 1_000,
        tokens: 2_048,
        tokens_per_second: 1_234.0 + (step % 7) as f64,
        gpu_bytes: 3 << 30,
        seconds: step as f64 * 2.0,
    })
}

fn eval(step: u64, loss: f64) -> Record {
    Record::Eval(EvalRecord { step, loss, perplexity: loss.exp(), tokens: 4_321, seconds: 1.0 })
}

fn falling(steps: u64) -> Vec<Record> {
    (1..=steps).map(|n| step(n, 1.0 + 2.0 / n as f32, 0.5 + (n % 5) as f32 / 10.0)).collect()
}

fn render(records: Vec<Record>) -> String {
    html(&Report { title: "Run".to_owned(), records, ..Report::default() })
}

/// The texts from each `open` to the next `close`, including both.
fn parts<'a>(text: &'a str, open: &str, close: &str) -> Vec<&'a str> {
    let part = |(at, _): (usize, &str)| {
        let rest = &text[at..];
        &rest[..rest.find(close).unwrap() + close.len()]
    };
    text.match_indices(open).map(part).collect()
}

/// Fails unless the text is one XML element: tags that close each other, attributes in quotes, no
/// stray `<`, `>` or `&`.
fn assert_xml(text: &str) {
    let tag = regex::Regex::new(r#"^<(/?)([a-z]+)((?: [a-zA-Z-]+="[^"<>&]*")*)(/?)>"#).unwrap();
    let (mut open, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let found = tag.captures(rest).unwrap_or_else(|| panic!("no tag: {:.80}", rest));
        match (&found[1], &found[4]) {
            ("/", "") => assert_eq!(open.pop(), Some(found[2].to_owned())),
            ("", "") => open.push(found[2].to_owned()),
            ("", "/") => {}
            other => panic!("{other:?}"),
        }
        rest = rest[found[0].len()..].trim_start_matches(|c| !"<>&".contains(c));
        assert!(rest.is_empty() == open.is_empty(), "something after the end, or no end: {rest:.80}");
    }
}

/// The points of a path. Checks that each `M`, `L`, `H` and `h0` is within the drawing.
fn points(path: &str) -> Vec<(f64, f64)> {
    let d = path.split_once(" d=\"").unwrap().1.split_once('"').unwrap().0;
    let command = regex::Regex::new(r"^(?:[ML]([0-9.]+) ([0-9.]+)|H1000|h0)").unwrap();
    let (mut rest, mut points) = (d, Vec::new());
    while !rest.is_empty() {
        let found = command.captures(rest).unwrap_or_else(|| panic!("no command: {:.40}", rest));
        if let (Some(x), Some(y)) = (found.get(1), found.get(2)) {
            points.push((x.as_str().parse().unwrap(), y.as_str().parse().unwrap()));
        }
        rest = &rest[found[0].len()..];
    }
    assert!(points.iter().all(|(x, y)| (0.0..=SIZE.0).contains(x) && (0.0..=SIZE.1).contains(y)), "{points:?}");
    points
}

/// The paths of a drawing: class and points.
type Drawing = Vec<(String, Vec<(f64, f64)>)>;

/// Checks everything in a report except its words; returns its drawings.
#[track_caller]
fn drawings(html: &str) -> Vec<Drawing> {
    let drawings = parts(html, "<svg", "</svg>");
    assert_eq!(drawings.len(), 4);
    assert!(!html.contains("NaN") && !html.contains(">inf"), "a number that is none");
    for data in parts(html, "data-curves='", "'>") {
        let json = data.strip_prefix("data-curves='").unwrap().strip_suffix("'>").unwrap();
        serde_json::from_str::<Vec<(String, String, Vec<(f64, f64, u64, String)>)>>(json).unwrap();
    }
    let class = |path: &str| path.split_once("class=\"").unwrap().1.split_once('"').unwrap().0.to_owned();
    let paths = |svg: &&str| parts(svg, "<path", "/>").into_iter().map(|p| (class(p), points(p))).collect();
    drawings.iter().chain(&parts(html, "<figcaption", "</figcaption>")).for_each(|part| assert_xml(part));
    drawings.iter().map(paths).collect()
}

fn of_class<'a>(drawing: &'a Drawing, class: &str) -> &'a [(f64, f64)] {
    drawing.iter().find(|(c, _)| c == class).map_or(&[], |(_, points)| points)
}

#[test]
fn every_step_is_a_point_of_every_curve() {
    let mut records = falling(100);
    records.extend([eval(50, 2.0), eval(100, 1.5)]);
    let html = render(records);
    let drawings = drawings(&html);
    for drawing in [&drawings[0], &drawings[2], &drawings[3]] {
        assert_eq!((of_class(drawing, "faint").len(), of_class(drawing, "strong").len()), (100, 100));
    }
    assert_eq!(of_class(&drawings[1], "strong").len(), 100);
    let loss = of_class(&drawings[0], "faint");
    assert!(loss.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "to the right and, as it falls, down");
    assert_eq!((loss[0].0, loss[99].0), (0.0, SIZE.0));
    let held_out = of_class(&drawings[0], "points dots");
    // Between steps 1 and 100, between losses of 1 and 3.
    assert_eq!(held_out, [(494.9, 150.0), (1000.0, 225.0)]);
    assert_eq!(of_class(&drawings[2], "limit").len(), 1, "the limit of the gradient norm is on its scale");
}

#[test]
fn the_final_numbers_are_there() {
    let mut records = falling(4);
    records.extend([eval(2, 1.25), eval(4, 1.5)]);
    let html = render(records);
    for text in [
        "4 steps · 0.04 epochs · 8,192 tokens, 4,000 of them learned",
        "3.000 → 1.500<small>first and last step",
        "1.500<small>at step 4; best 1.250 at step 2",
        "4.482<small>over 4,321 tokens",
        "1,236<small>median",
        "8.00 s<small>",
        "3.00 GiB<small>",
    ] {
        assert!(html.contains(text), "{text}");
    }
}

#[test]
fn durations_are_no_finer_than_they_need() {
    let read = [0.0031, 0.314, 42.4, 125.0, 3725.0, 9e6, f64::NAN, -1.0].map(duration);
    assert_eq!(read, ["3.1 ms", "0.31 s", "42 s", "2 min 05 s", "1 h 02 min", "2,500 h 00 min", "unknown", "unknown"]);
}

#[test]
fn the_settings_are_those_of_the_run() {
    let rows = |settings: &Settings| rows(settings).into_iter().collect::<std::collections::BTreeMap<_, _>>();
    let default = rows(&Settings::default());
    let value = |rows: &std::collections::BTreeMap<String, String>, name: &str| rows.get(name).cloned();
    let expected = [
        ("rank", "16"),
        ("targets", "all-linear"),
        ("lr", "0.0002"),
        ("schedule", "cosine"),
        ("warmup", "0.03 of all steps"),
        ("epochs", "1"),
        ("micro-batch", "auto"),
        ("clip", "1"),
        ("train-on", "completions"),
        ("eval-every", "epoch"),
    ];
    for (name, expected) in expected {
        assert_eq!(value(&default, name).as_deref(), Some(expected), "{name}");
    }
    assert!(["steps", "early-stop", "vram-budget"].iter().all(|name| !default.contains_key(*name)));
    let steps = rows(&Settings {
        steps: Some(70),
        targets: vec![crate::format::Role::QProj, crate::format::Role::VProj],
        warmup: crate::train::schedule::Warmup::Steps(5),
        clip: None,
        ..Settings::default()
    });
    let found = ["steps", "epochs", "targets", "warmup", "clip"].map(|name| value(&steps, name));
    assert_eq!(found, [Some("70".into()), None, Some("q_proj, v_proj".into()), Some("5 steps".into()), Some("off".into())]);
    assert!(render(falling(2)).contains("<th scope=\"row\">rank</th><td>16</td>"));
}

#[test]
fn no_step_and_one_step_have_reports() {
    let empty = render(Vec::new());
    assert!(empty.contains("No step was recorded"));
    drawings(&empty);
    let one = render(falling(1));
    let drawings = drawings(&one);
    assert_eq!(of_class(&drawings[0], "strong dots"), [(500.0, 150.0)], "a dot in the middle");
    assert!(one.contains("of one step") && !one.contains("Held-out"));
    drawings.iter().for_each(|drawing| assert_eq!(of_class(drawing, "strong").len(), 1));
}

#[test]
fn a_hundred_thousand_steps_are_a_small_file() {
    let mut records = falling(100_000);
    records.extend((1..=5_000).map(|n| eval(n * 20, 2.0)));
    records[70_000] = step(70_001, 2.9, 0.5);
    let html = render(records);
    assert!(html.len() < 600_000, "{}", html.len());
    let drawings = drawings(&html);
    for (_, points) in drawings.iter().flatten() {
        assert!(points.len() <= MAX_POINTS, "{}", points.len());
    }
    let spike = of_class(&drawings[0], "faint").iter().find(|(x, _)| *x == 700.0);
    assert!(spike.is_some_and(|(_, y)| *y < 20.0), "{spike:?}");
}

#[test]
fn numbers_that_are_not_finite_are_gaps_and_are_reported() {
    let mut records = falling(30);
    records[10] = step(11, f32::NAN, f32::INFINITY);
    records[12] = step(13, f32::NAN, f32::INFINITY);
    records.push(eval(30, f64::INFINITY));
    let html = render(records);
    let drawings = drawings(&html);
    assert_eq!(of_class(&drawings[0], "faint").len(), 28);
    assert_eq!(of_class(&drawings[0], "faint dots").len(), 1, "the step between two gaps");
    assert!(html.contains("2 steps have values that cannot be drawn (not a finite number); the first is step 11."));
    assert!(html.contains("not finite<small>at step 30"));

    let all = render((1..50).map(|n| step(n, f32::NAN, f32::NAN)).collect());
    self::drawings(&all);
    assert!(all.contains("not finite → not finite"), "the last loss of a run that failed is not hidden");
}

#[test]
fn texts_are_escaped() {
    let evil = "</title></script><script>alert('1')</script>\"&<img src=x>".to_owned();
    let facts = vec![(evil.clone(), evil.clone())];
    let html = html(&Report { title: evil, facts, records: falling(2), ..Report::default() });
    assert_eq!(html.matches("<script").count(), 1, "our own");
    assert_eq!(html.matches("<img").count(), 0);
    let escaped = "&lt;/title&gt;&lt;/script&gt;&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;&quot;&amp;&lt;img src=x&gt;";
    assert_eq!(html.matches(escaped).count(), 4, "title and heading, name and value of a fact");
    drawings(&html);
}

#[test]
fn nothing_is_fetched() {
    let html = render(falling(3));
    let elsewhere = html.replace("http://www.w3.org/2000/svg", "");
    for text in ["http:", "https:", "url(", "@import", " src=", "fetch("] {
        assert!(!elsewhere.contains(text), "{text}");
    }
    assert!(html.contains("default-src 'none'"));
}
