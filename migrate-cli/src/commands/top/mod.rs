//! `migrate top`: a cluster as one of its scheduler's agents sees it, in a terminal.
//!
//! | module | what it does |
//! |---|---|
//! | `rows` | what is shown, as words |
//! | `screen` | what was heard, what is chosen, and what keys do |
//! | `draw` | the picture in a terminal |
//! | `text` | the same as plain text |

mod draw;
mod rows;
mod screen;
#[cfg(test)]
mod tests;
mod text;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use scheduler_api::{ApiError, Client, View};
use tokio::time::sleep;
use transport::Identity;

use self::screen::Screen;
use crate::args::TopArgs;
use crate::blocking::on_thread;
use crate::cancel;
use crate::error::EngineError;

/// Longest time from an answer to its picture.
const REDRAW: Duration = Duration::from_millis(250);

pub(super) async fn run(args: &TopArgs) -> ExitCode {
    let identity = match Identity::load(&args.identity).map_err(EngineError::from) {
        Ok(identity) => identity,
        Err(error) => {
            eprintln!("error: {}", error.tell());
            return ExitCode::from(1);
        }
    };
    let mut agents = Agents { client: Client::new(Arc::new(identity)), addrs: args.agent.clone() };
    if args.once {
        return once(&mut agents).await;
    }
    match watch(agents, Duration::from_secs(args.interval_s)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error.tell());
            ExitCode::from(1)
        }
    }
}

/// Agents that may be asked; any will do.
struct Agents {
    client: Client,
    addrs: Vec<String>,
}

impl Agents {
    /// What the first says that answers; it is the first to be asked from then on.
    async fn ask(&mut self) -> Result<View, ApiError> {
        let mut last = None;
        for index in 0..self.addrs.len() {
            let Some(addr) = self.addrs.get(index) else { continue };
            match self.client.state(addr, None).await {
                Ok(view) => {
                    self.addrs.rotate_left(index);
                    return Ok(view);
                }
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| ApiError::BadRequest { what: "No agent is named".to_owned() }))
    }
}

async fn once(agents: &mut Agents) -> ExitCode {
    match agents.ask().await {
        Ok(view) => {
            print!("{}", text::picture(&view));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(1)
        }
    }
}

/// Shows the cluster until the user wants out.
async fn watch(agents: Agents, interval: Duration) -> Result<(), EngineError> {
    let screen = Arc::new(Mutex::new(Screen::new(agents.addrs.join(", "))));
    let asking = tokio::spawn(keep_asking(agents, interval, Arc::clone(&screen)));
    let stopping = {
        let screen = Arc::clone(&screen);
        tokio::spawn(async move {
            cancel::requested().await;
            screen.lock().leave();
        })
    };
    let shown = on_thread(move || show(&screen)).await;
    asking.abort();
    stopping.abort();
    shown?.map_err(|error| EngineError::Internal(format!("the terminal cannot be used: {error}")))
}

async fn keep_asking(mut agents: Agents, interval: Duration, screen: Arc<Mutex<Screen>>) {
    loop {
        let answer = agents.ask().await;
        screen.lock().hear(answer, Instant::now());
        sleep(interval).await;
    }
}

/// Draws and takes keys, with the terminal for itself.
fn show(screen: &Mutex<Screen>) -> std::io::Result<()> {
    let mut terminal = ratatui::try_init()?;
    let shown = loop {
        if let Err(error) =
            terminal.draw(|frame| draw::all(frame, &mut screen.lock(), Instant::now()))
        {
            break Err(error);
        }
        match take_key(screen) {
            Ok(()) if screen.lock().is_left() => break Ok(()),
            Ok(()) => {}
            Err(error) => break Err(error),
        }
    };
    ratatui::restore();
    shown
}

fn take_key(screen: &Mutex<Screen>) -> std::io::Result<()> {
    if !event::poll(REDRAW)? {
        return Ok(());
    }
    if let Event::Key(key) = event::read()?
        && key.kind != KeyEventKind::Release
    {
        screen.lock().press(key);
    }
    Ok(())
}
