//! Logs that grow, are cut and replaced, and lines of every kind.

use std::io::Write as _;
use std::path::Path;

use proptest::prelude::*;

use super::*;

const RULE: &str = r#"
guest = "web1"
pattern = '" (?<status>\d{3}) (?:(?<at_s>[\d.]+) )?rt=(?<response_ms>[\d.]+)(?: st=(?<service_us>\d+))?'
promised-response-s = 0.5
"#;

fn rule(file: &Path) -> Rule {
    toml::from_str(&format!("file = {file:?}\n{RULE}")).unwrap()
}

fn append(file: &Path, text: &str) {
    let file = File::options().append(true).create(true).open(file);
    file.unwrap().write_all(text.as_bytes()).unwrap();
}

#[test]
fn requests_become_figures() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("log");
    append(&file, "\"GET /\" 200 rt=100000\n");
    let mut probe = LogProbe::new(rule(&file));
    assert_eq!(probe.read(0.0), Ok(None), "what was there before does not count");
    append(&file, "GET \" 200 10.0 rt=100 st=2000\nGET \" 200 10.5 rt=300 st=4000\nnoise\n");
    append(&file, "GET \" 503 11.5 rt=1\nGET \" 200 11.6 rt=");
    let seen = probe.read(10.0).unwrap().unwrap();
    assert_eq!((seen.served_per_s, seen.dropped_per_s), (0.2, 0.1));
    assert!((seen.response_s - 0.2).abs() < 1e-9 && (seen.service_s - 0.003).abs() < 1e-9);
    assert!((seen.arrival_variance_s2 - 0.125).abs() < 1e-9, "{seen:?}");
    assert!((seen.service_variance_s2 - 2e-6).abs() < 1e-12, "{seen:?}");
    assert_eq!((seen.promised_response_s, seen.promised_drops), (0.5, 1.0));
    append(&file, "900\n");
    let seen = probe.read(20.0).unwrap().unwrap();
    assert_eq!((seen.served_per_s, seen.response_s, seen.service_s), (0.1, 0.9, 0.9));
    assert_eq!(probe.read(30.0).unwrap().unwrap().served_per_s, 0.0, "nobody asked for anything");
}

#[test]
fn logs_are_cut_replaced_and_missing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("log");
    let line = "\" 200 rt=50\n";
    append(&file, &line.repeat(10));
    let mut probe = LogProbe::new(rule(&file));
    probe.read(0.0).unwrap();
    std::fs::write(&file, line).unwrap();
    assert_eq!(probe.read(1.0).unwrap().unwrap().served_per_s, 1.0, "it was cut");
    std::fs::rename(&file, folder.path().join("log.1")).unwrap();
    let why = probe.read(2.0).unwrap_err();
    assert!(why.contains("log cannot be read: No such file"), "{why}");
    append(&file, &line.repeat(3));
    let seen = probe.read(3.0).unwrap().unwrap();
    assert_eq!(seen.served_per_s, 1.5, "it was replaced; two seconds have passed");
    append(&file, &line.repeat(BYTES_MAX as usize / line.len() + 100));
    assert!(probe.read(4.0).unwrap_err().contains("grows too fast"));
    append(&file, line);
    let seen = probe.read(5.0).unwrap().unwrap();
    assert_eq!((seen.served_per_s, seen.arrival_variance_s2), (1.0, 1.0), "as if random");
}

#[test]
fn what_is_wrong_with_a_pattern_is_said() {
    let wrong = |pattern: &str| Pattern::try_from(pattern.to_owned()).unwrap_err();
    assert!(wrong("(").contains("is no pattern"));
    assert!(wrong("(?<respons>x)").contains("unknown group \"respons\"; there are response_s,"));
    assert!(wrong("(?<status>x)").contains("add (?<response_s>"));
    assert!(wrong(r"(?<response_s>\w{9999})").contains("is no pattern"), "it is too large");
    let rule = rule(Path::new("/log"));
    assert_eq!(toml::from_str::<Rule>(&toml::to_string(&rule).unwrap()).unwrap(), rule);
}

proptest! {
    #[test]
    fn whatever_is_logged_is_figures_that_can_be(
        lines in prop::collection::vec(
            prop_oneof![
                "\" [0-9]{3} ([0-9.]{1,12} )?rt=[0-9.]{1,20}( st=[0-9]{1,30})?",
                "\\PC{0,60}",
            ],
            0..30,
        ),
    ) {
        let mut probe = LogProbe::new(rule(Path::new("/log")));
        let mut sums = Sums::default();
        lines.iter().for_each(|line| probe.add(line, &mut sums));
        let seen = probe.figures(&sums, 10.0);
        let all = [
            seen.served_per_s, seen.dropped_per_s, seen.response_s, seen.service_s,
            seen.arrival_variance_s2, seen.service_variance_s2,
        ];
        prop_assert!(all.iter().all(|figure| figure.is_finite() && *figure >= 0.0), "{seen:?}");
    }
}
