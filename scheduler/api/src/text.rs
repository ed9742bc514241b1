//! Text of others, shown in a terminal.

/// Without what could steer a terminal or turn a line's direction.
#[must_use]
pub fn clean(text: &str) -> String {
    let is_safe = |character: char| {
        !character.is_control()
            && !matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    text.chars().map(|character| if is_safe(character) { character } else { '?' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_a_terminal_is_not_shown() {
        assert_eq!(clean("vm\u{1b}[2J\n\u{202e}1"), "vm?[2J??1");
        assert_eq!(clean("Gäste → b"), "Gäste → b");
    }
}
