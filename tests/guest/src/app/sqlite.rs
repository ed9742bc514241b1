//! SQLite in WAL mode on tmpfs. Options: `memory` (MiB of the database), `rows` (of a transaction).
//!
//! Every transaction gives some rows a new random blob and counts each of them up. Now and then the
//! database is checked as a whole, and the sum of all counts is compared with what was
//! asked for. An operation is a transaction.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{ChildStdin, ChildStdout, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use guest_programs::options::Options;
use guest_programs::rng::XorShift;

use super::{Progress, load, program};

/// Bytes of a row's blob.
const BLOB_BYTES: u64 = 1000;

/// Rows in a MiB of the database: four a page of 4096 bytes.
const ROWS_PER_MIB: u64 = 1024;

/// Transactions between two checks of the whole database.
const CHECK_EVERY: u64 = 500;

/// What the shell prints after each piece of work, so that it is known to be done.
const DONE: &str = "godwit-done";

struct Sqlite {
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    rng: XorShift,
    rows: u64,
    rows_of_one: u64,
    transactions: u64,
    counted: u64,
}

impl Sqlite {
    /// Runs statements; the lines that they print.
    fn ask(&mut self, sql: &str) -> Result<Vec<String>> {
        writeln!(self.input, "{sql}\nSELECT '{DONE}';").context("sqlite3 takes no statements")?;
        let mut lines = vec![];
        loop {
            let mut line = String::new();
            let count = self.output.read_line(&mut line).context("sqlite3 does not answer")?;
            ensure!(count > 0, "sqlite3 has ended; it said {:?}", lines.last());
            let line = line.trim_end();
            if line == DONE {
                return Ok(lines);
            }
            lines.push(line.to_owned());
        }
    }

    /// A transaction over rows in a row from a random one on, so that none is hit twice.
    fn transact(&mut self) -> Result<()> {
        let first = self.rng.below(self.rows - self.rows_of_one + 1);
        let last = first + self.rows_of_one - 1;
        let sql = format!(
            "BEGIN; UPDATE t SET n = n + 1, v = randomblob({BLOB_BYTES}) WHERE id BETWEEN {first} \
             AND {last}; COMMIT;"
        );
        let said = self.ask(&sql)?;
        ensure!(said.is_empty(), "sqlite3 said {said:?}");
        self.counted += self.rows_of_one;
        self.transactions += 1;
        if self.transactions.is_multiple_of(CHECK_EVERY) {
            self.check()?;
        }
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        let said = self.ask("PRAGMA quick_check; SELECT count(*), sum(n) FROM t;")?;
        let wanted = ["ok".to_owned(), format!("{}|{}", self.rows, self.counted)];
        if said != wanted {
            bail!("The database holds {said:?} instead of {wanted:?}");
        }
        Ok(())
    }
}

/// Fills a database and puts it under load.
pub(super) fn start(mut options: Options, progress: &Arc<Progress>) -> Result<()> {
    let memory_mib = options.number("memory", 64)?;
    let rows_of_one = options.number("rows", 20)?;
    let seed = options.number("seed", 1)?;
    options.finish()?;
    ensure!((8..=2048).contains(&memory_mib), "memory is 8 to 2048 MiB");
    ensure!((1..=1000).contains(&rows_of_one), "rows is 1 to 1000");
    let mut shell = program("sqlite3")
        .args(["-batch", "-bail", "/tmp/app.db"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("Cannot start sqlite3")?;
    let (Some(input), Some(output)) = (shell.stdin.take(), shell.stdout.take()) else {
        bail!("No pipes to sqlite3")
    };
    let rows = memory_mib * ROWS_PER_MIB;
    let mut sqlite = Sqlite {
        input,
        output: BufReader::new(output),
        rng: XorShift::new(seed),
        rows,
        rows_of_one,
        transactions: 0,
        counted: 0,
    };
    sqlite.ask(&format!(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA cache_size = -8192;\n\
         CREATE TABLE t(id INTEGER PRIMARY KEY, n INTEGER NOT NULL, v BLOB NOT NULL);\n\
         INSERT INTO t WITH RECURSIVE c(x) AS (VALUES(0) UNION ALL SELECT x + 1 FROM c WHERE x < \
         {rows} - 1) SELECT x, 0, randomblob({BLOB_BYTES}) FROM c;"
    ))?;
    sqlite.check()?;
    load(progress, move |progress| {
        sqlite.transact()?;
        progress.add(1);
        Ok(())
    });
    Ok(())
}
