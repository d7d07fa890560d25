//! The folder of a training checkpoint, and the records of a run, with one of their files changed:
//! they are refused with a reason, or hold what the layout of the adapter asks for.

use std::fs;
use std::path::PathBuf;

use arbitrary::{Result, Unstructured};
use nf4pack::fuzzing::{
    Checkpoint, Fingerprint, METRICS, OPTIMIZER, Recorder, STATE, State, adapter_lengths, read_metrics, state_checksum,
};
use serde_json::{Value, json};

use super::adapter::{Base, edited_safetensors, write};
use super::json;

const KEYS: [&str; 21] = [
    "format",
    "checksum",
    "state_checksum",
    "state",
    "step",
    "total_steps",
    "epoch",
    "row",
    "micro_batches",
    "trained_tokens",
    "seconds",
    "now",
    "best_eval",
    "best_step",
    "best_adapter",
    "evals_without_gain",
    "eval_due",
    "fingerprint",
    "--micro-batch",
    "loss",
    "type",
];

const RECORD: &str =
    r#"{"type": "step", "step": 1, "epoch": 0.5, "loss": 2.5, "lr": 0.001, "grad_norm": 1.0, "seconds": 0.25}"#;

/// A folder with one good checkpoint.
struct Run {
    base: Base,
    folder: PathBuf,
    state: Value,
    moments: Vec<u8>,
    _out: tempfile::TempDir,
}

thread_local! {
    static RUN: Run = Run::new();
}

/// Runs the check: text is the state, and the records; bytes from 0xc0 on are the moments; others
/// choose changes of them.
pub fn run(bytes: &[u8]) {
    RUN.with(|run| match bytes.first() {
        None | Some(..0x80) => {
            run.check(bytes, &run.moments);
            run.check_records(bytes);
        }
        Some(0xc0..) => run.check(run.state.to_string().as_bytes(), &bytes[1..]),
        Some(_) => {
            let _ = run.edited(&mut Unstructured::new(&bytes[1..]));
        }
    });
}

impl Run {
    fn new() -> Self {
        let (base, out) = (Base::new(), tempfile::tempdir().expect("a temporary folder"));
        let fingerprint: Fingerprint = serde_json::from_value(json!({"PACK": "a", "--micro-batch": "2"})).expect("a map");
        let moments = vec![0.5; adapter_lengths(&base.adapter)[0]];
        let state = State::new(10, 0, fingerprint);
        let checkpoint = Checkpoint { adapter: base.adapter.clone(), exp_avg: moments.clone(), exp_avg_sq: moments, state };
        let folder = checkpoint.write(out.path()).expect("a good checkpoint");
        let read = |name: &str| fs::read(folder.join(name)).expect("a file of the checkpoint");
        let state = serde_json::from_slice(&read(STATE)).expect("JSON");
        let run = Self { moments: read(OPTIMIZER), base, state, folder, _out: out };
        assert!(Checkpoint::read(&run.folder, &run.base.model).is_ok(), "what was written");
        run
    }

    fn edited(&self, u: &mut Unstructured<'_>) -> Result<()> {
        if u.ratio(1, 4)? {
            let mut lines = Vec::new();
            for _ in 0..u.int_in_range(0..=4)? {
                let mut record = serde_json::from_str(RECORD).map_err(|_| arbitrary::Error::IncorrectFormat)?;
                json::edit(u, &mut record, &KEYS)?;
                lines.extend(json::bytes(u, &record)?);
                lines.push(b'\n');
            }
            self.check_records(&lines);
            return Ok(());
        }
        let (mut state, mut moments) = (self.state.clone(), self.moments.clone());
        if u.arbitrary()? {
            json::edit(u, &mut state, &KEYS)?;
            // Most edits would stop at the checksum of the state.
            if u.ratio(7, 8)? {
                renew_state_checksum(&mut state);
            }
        } else {
            moments = edited_safetensors(u, &moments)?;
        }
        self.check(&json::bytes(u, &state)?, &moments);
        Ok(())
    }

    fn check(&self, state: &[u8], moments: &[u8]) {
        write(&self.folder, STATE, state);
        write(&self.folder, OPTIMIZER, moments);
        match Checkpoint::read(&self.folder, &self.base.model) {
            Ok(found) => {
                let [floats, expected] = adapter_lengths(&found.adapter);
                assert_eq!([floats, found.exp_avg.len(), found.exp_avg_sq.len()], [expected; 3]);
                assert_eq!(found.adapter, self.base.adapter, "its files did not change");
                let _ = found.state.fingerprint.micro_batch();
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }

    fn check_records(&self, bytes: &[u8]) {
        let folder = self.folder.join("records");
        fs::create_dir_all(&folder).expect("a folder");
        write(&folder, METRICS, bytes);
        let lines = bytes.iter().filter(|&&byte| byte == b'\n').count();
        if let Err(error) = read_metrics(&folder.join(METRICS)) {
            assert!(!error.to_string().is_empty());
        }
        match Recorder::resume(&folder, 5, false) {
            Ok((_, records)) => assert!(records.len() <= lines + 1),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        fs::remove_dir_all(&folder).expect("the folder");
    }
}

/// Gives an edited state, if it still is one, its checksum.
fn renew_state_checksum(file: &mut Value) {
    if let Ok(state) = serde_json::from_value::<State>(file.get("state").cloned().unwrap_or_default())
        && let (Some(file), Ok(checksum)) = (file.as_object_mut(), state_checksum(&state))
    {
        file.insert("state_checksum".to_owned(), checksum.into());
    }
}
