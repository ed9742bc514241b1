//! Lines for the user on stderr. Where one process does several things, each line says which of them speaks.

use std::fmt::Arguments;
use std::sync::Arc;

tokio::task_local! {
    static SPEAKER: Arc<str>;
}

/// Runs `work`; its lines begin with `name`. Threads and tasks that it starts speak without it.
pub async fn speaking_as<T>(name: Arc<str>, work: impl Future<Output = T>) -> T {
    SPEAKER.scope(name, work).await
}

/// Writes a line.
pub fn line(text: Arguments<'_>) {
    let spoken = SPEAKER.try_with(|name| eprintln!("{name}: {text}"));
    if spoken.is_err() {
        eprintln!("{text}");
    }
}

/// Tells the user something, as `eprintln!` does, with the speaker's name if there are several.
#[macro_export]
macro_rules! tell {
    ($($text:tt)*) => {
        $crate::tell::line(format_args!($($text)*))
    };
}
