//! Reads a stream that comes in pieces.

use std::sync::Arc;

use super::blocks::BlockList;
use super::cursor::{Gather, Stop};
use super::error::{Refusal, StreamError};
use super::event::{EndSign, Event};
use super::grammar::{Element, Grammar, Place, Scope, Silent, TYPE_END};
use super::tail::{self, PACKAGE_TAIL_BYTES, Tail};

/// Takes a stream in pieces of any size and hands out its elements.
///
/// ```
/// # use qemu_glue::stream::{Reader, StreamError};
/// fn count(pieces: &[&[u8]]) -> Result<usize, StreamError> {
///     let mut reader = Reader::new();
///     let mut events = 0;
///     for piece in pieces {
///         let mut input = *piece;
///         while reader.next(&mut input)?.is_some() {
///             events += 1;
///         }
///     }
///     // The connection was closed.
///     reader.finish()?;
///     while reader.next(&mut &[][..])?.is_some() {
///         events += 1;
///     }
///     Ok(events)
/// }
/// # let head = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc";
/// # assert!(count(&[head, b"\x08\0\x01\0\0"]).is_err());
/// ```
#[derive(Debug)]
pub struct Reader {
    grammar: Grammar,
    /// An element that began in an earlier piece, or a possible end that is held back.
    gather: Gather,
    /// So many bytes are wanted there before it is looked at again.
    wanted: usize,
    tail: Tail,
    /// Bytes from the stream's start to what has not been handed out.
    at_byte: u64,
    finished: bool,
    stopped: bool,
    open_ended: bool,
}

/// What comes next.
enum Task {
    Element,
    Bytes { left: u64 },
    DeviceState,
    PackageState { left: u64 },
    Nothing,
}

/// What became of an element.
enum Step<'a> {
    Event(Event<'a>),
    /// An event of this length is in the gathered bytes, from where it is to be handed out.
    Gathered(usize),
    /// It is no event.
    Again,
    /// It is not all there.
    More,
}

impl Default for Reader {
    fn default() -> Self {
        Self::new()
    }
}

impl Reader {
    /// For a stream from its first byte on.
    pub fn new() -> Self {
        Self::with(Grammar::stream())
    }

    /// For who passes a stream on and need not know where it ends: device state is handed out as it
    /// comes, with what follows it, until the connection ends.
    pub fn open_ended() -> Self {
        Self { open_ended: true, ..Self::new() }
    }

    /// For the contents of a package ([`Command::Packaged`](super::Command::Packaged)), the
    /// [`Event::Bytes`] that follow it.
    pub fn package(size_bytes: u32) -> Self {
        Self::with(Grammar::package(u64::from(size_bytes)))
    }

    /// For the connection that takes over after one was broken in post-copy: it begins with
    /// commands, and goes on with the section of RAM that the first one began.
    pub fn resumed(ram_section: u32, blocks: Arc<BlockList>) -> Self {
        Self::with(Grammar::resumed(ram_section, blocks))
    }

    fn with(grammar: Grammar) -> Self {
        Self {
            grammar,
            gather: Gather::default(),
            wanted: 0,
            tail: Tail::default(),
            at_byte: 0,
            finished: false,
            stopped: false,
            open_ended: false,
        }
    }

    /// The RAM blocks, once they were listed.
    pub fn blocks(&self) -> Option<&Arc<BlockList>> {
        match self.grammar.place() {
            Place::BlockTotal | Place::Block { .. } => None,
            _ => self.grammar.ram().map(|(_, blocks)| blocks),
        }
    }

    /// The number of the section `ram`, once it has begun.
    pub fn ram_section(&self) -> Option<u32> {
        self.grammar.ram().map(|(section, _)| section)
    }

    /// How many bytes of the stream have been handed out.
    pub fn at_byte(&self) -> u64 {
        self.at_byte
    }

    /// How much memory pieces of elements take that wait for their rest, in bytes.
    pub fn held_capacity_bytes(&self) -> usize {
        self.gather.capacity_bytes()
    }

    /// What can be said of the stream's end.
    pub fn end_sign(&self) -> EndSign {
        let held = self.gather.bytes();
        match (self.grammar.place(), self.grammar.scope()) {
            (Place::Ended | Place::Over, _) if held.is_empty() => EndSign::Certain,
            (_, Scope::Package { size_bytes }) if self.at_byte == size_bytes => EndSign::Certain,
            (Place::DeviceState, Scope::Connection) if tail::is_described(held) => {
                EndSign::Described
            }
            (Place::DeviceState, Scope::Connection) if held.last() == Some(&TYPE_END) => {
                EndSign::Possible
            }
            _ => EndSign::None,
        }
    }

    /// The next element; nothing if more input is needed. Takes what it uses off the front of
    /// `input`, and all of it when it returns nothing.
    ///
    /// # Errors
    /// [`StreamError`] if the stream is damaged or carries what is not read. From then on every
    /// call says so.
    pub fn next<'e, 'i: 'e>(
        &'e mut self,
        input: &mut &'i [u8],
    ) -> Result<Option<Event<'e>>, StreamError> {
        if self.stopped {
            return Err(self.error(Refusal::Stopped));
        }
        self.gather.clear_spent();
        if self.finished && !input.is_empty() {
            return Err(self.stop(Refusal::AfterEnd));
        }
        loop {
            match self.task(input) {
                Task::Bytes { left } => return Ok(self.bytes(left, input)),
                Task::DeviceState => return Ok(self.device_state(input)),
                Task::PackageState { left } => return Ok(self.package_state(left, input)),
                Task::Nothing => return self.nothing(input),
                Task::Element => {}
            }
            let step = match self.gather.is_empty() {
                true => self.fed(input)?,
                false => self.gathered(input)?,
            };
            match step {
                Step::Event(event) => return Ok(Some(event)),
                Step::Gathered(length) => return self.gathered_event(length),
                Step::Again => {}
                Step::More => return Ok(None),
            }
        }
    }

    /// What to do with what comes next.
    fn task(&mut self, input: &mut &[u8]) -> Task {
        let (ends, task) = match (self.grammar.place(), self.grammar.scope()) {
            (Place::Bytes { left, .. }, _) => (false, Task::Bytes { left }),
            (Place::DeviceState, Scope::Connection) if self.open_ended => {
                (false, Task::DeviceState)
            }
            (Place::DeviceState, Scope::Connection) => {
                (self.finished && self.state_ends(), Task::DeviceState)
            }
            (Place::DeviceState, Scope::Package { size_bytes }) => {
                let left = size_bytes.saturating_sub(self.at_byte);
                (self.package_state_ends(left, input), Task::PackageState { left })
            }
            _ => (true, Task::Element),
        };
        if !ends {
            return task;
        }
        let is_over = match self.grammar.scope() {
            Scope::Package { size_bytes } if self.at_byte >= size_bytes => true,
            _ => self.grammar.place() == Place::Over || self.finished && self.gather.is_empty(),
        };
        if is_over { Task::Nothing } else { Task::Element }
    }

    /// The stream has ended. What was held back as a possible end comes out of
    /// [`next`](Self::next) now.
    ///
    /// Without a return path the source closes its connection. With one it waits for `SHUT`, and
    /// the caller must know from elsewhere that nothing follows: from [`end_sign`](Self::end_sign),
    /// together with QEMU's monitor or some time without further bytes.
    ///
    /// # Errors
    /// [`Refusal::Cut`] if the stream cannot end here.
    pub fn finish(&mut self) -> Result<(), StreamError> {
        if self.stopped {
            return Err(self.error(Refusal::Stopped));
        }
        let in_state = self.grammar.place() == Place::DeviceState;
        let place = match self.end_sign() {
            EndSign::None if self.open_ended && in_state => {
                self.finished = true;
                return Ok(());
            }
            EndSign::Possible | EndSign::Described | EndSign::Certain => {
                self.finished = true;
                return Ok(());
            }
            EndSign::None => match self.grammar.place() {
                Place::Header => "within its header",
                Place::Top => "between two sections",
                Place::DeviceState => "within the device state",
                Place::Bytes { then_footer: None, .. } => "within a package",
                Place::Ended | Place::Over => "within the description",
                _ => "within a section",
            },
        };
        Err(self.stop(Refusal::Cut { place }))
    }

    fn error(&self, refusal: Refusal) -> StreamError {
        StreamError { at_byte: self.at_byte, refusal }
    }

    fn stop(&mut self, refusal: Refusal) -> StreamError {
        self.stopped = true;
        self.error(refusal)
    }

    /// Whether what is held of a finished stream is its end and nothing else.
    fn state_ends(&mut self) -> bool {
        let held = self.gather.bytes();
        let ends = held.len() == 1 || tail::is_described(held);
        if ends {
            self.grammar.end_device_state();
            self.wanted = 0;
        }
        ends
    }

    fn nothing<'e>(&mut self, input: &[u8]) -> Result<Option<Event<'e>>, StreamError> {
        if input.is_empty() && self.gather.is_empty() {
            return Ok(None);
        }
        Err(self.stop(Refusal::AfterEnd))
    }

    /// An element of a package does not reach beyond it.
    fn check_within(&mut self, length: usize) -> Result<(), StreamError> {
        match self.grammar.scope() {
            Scope::Package { size_bytes }
                if self.at_byte.saturating_add(length as u64) > size_bytes =>
            {
                Err(self.stop(Refusal::AfterEnd))
            }
            _ => Ok(()),
        }
    }

    fn silent<'e>(&mut self, silent: Silent, length: usize) -> Result<Step<'e>, StreamError> {
        match self.grammar.enter_silent(silent) {
            Ok(event) => {
                self.at_byte = self.at_byte.saturating_add(length as u64);
                Ok(event.map_or(Step::Again, Step::Event))
            }
            Err(refusal) => Err(self.stop(refusal)),
        }
    }

    /// Takes an element off the input, or what there is of it.
    fn fed<'i>(&mut self, input: &mut &'i [u8]) -> Result<Step<'i>, StreamError> {
        let (element, length) = match self.grammar.element(input) {
            Ok(read) => read,
            Err(Stop::Refused(refusal)) => return Err(self.stop(refusal)),
            Err(Stop::Need(bytes)) => {
                self.wanted = bytes;
                self.gather.take_all(input);
                return Ok(Step::More);
            }
        };
        self.check_within(length)?;
        let step = match element {
            Element::Silent(silent) => self.silent(silent, length)?,
            Element::Event(event) => {
                self.grammar.enter(&event).map_err(|refusal| self.stop(refusal))?;
                self.at_byte = self.at_byte.saturating_add(length as u64);
                Step::Event(event)
            }
        };
        *input = input.get(length..).unwrap_or_default();
        Ok(step)
    }

    /// Completes the element that began in an earlier piece.
    fn gathered<'i>(&mut self, input: &mut &[u8]) -> Result<Step<'i>, StreamError> {
        loop {
            if !self.gather.fill(self.wanted, input) {
                return Ok(Step::More);
            }
            match self.grammar.element(self.gather.bytes()) {
                Err(Stop::Need(bytes)) => self.wanted = bytes,
                Err(Stop::Refused(refusal)) => return Err(self.stop(refusal)),
                Ok((Element::Event(_), length)) => {
                    self.check_within(length)?;
                    return Ok(Step::Gathered(length));
                }
                Ok((Element::Silent(silent), length)) => {
                    self.check_within(length)?;
                    self.gather.spend(length);
                    self.gather.clear_spent();
                    self.wanted = 0;
                    return self.silent(silent, length);
                }
            }
        }
    }

    /// Hands out the event that has been gathered.
    fn gathered_event(&mut self, length: usize) -> Result<Option<Event<'_>>, StreamError> {
        let Self { grammar, gather, .. } = self;
        let at_byte = self.at_byte;
        let entered = match grammar.element(gather.spend_seeing_all(length)) {
            Ok((Element::Event(event), _)) => grammar.enter(&event).map(|()| event),
            Err(Stop::Refused(refusal)) => Err(refusal),
            _ => return Ok(None),
        };
        self.wanted = 0;
        match entered {
            Ok(event) => {
                self.at_byte = at_byte.saturating_add(length as u64);
                Ok(Some(event))
            }
            Err(refusal) => {
                self.stopped = true;
                Err(StreamError { at_byte, refusal })
            }
        }
    }

    /// Hands out up to `left` bytes that are not looked into.
    fn bytes<'e, 'i: 'e>(&'e mut self, left: u64, input: &mut &'i [u8]) -> Option<Event<'e>> {
        let most = usize::try_from(left).unwrap_or(usize::MAX);
        let taken = if self.gather.is_empty() {
            take(input, most)
        } else {
            let held = self.gather.bytes().len();
            self.gather.spend(most.min(held))
        };
        if taken.is_empty() {
            return None;
        }
        self.at_byte = self.at_byte.saturating_add(taken.len() as u64);
        self.grammar.passed(taken.len());
        Some(Event::Bytes(taken))
    }

    /// Hands out device state up to where the stream might end.
    fn device_state<'e, 'i: 'e>(&'e mut self, input: &mut &'i [u8]) -> Option<Event<'e>> {
        if self.open_ended {
            let held = self.gather.bytes().len();
            let taken = match held {
                0 => take(input, input.len()),
                held => self.gather.spend(held),
            };
            self.at_byte = self.at_byte.saturating_add(taken.len() as u64);
            return (!taken.is_empty()).then_some(Event::DeviceState(taken));
        }
        if self.finished {
            // What seemed to begin a description was state: only the last byte is the end.
            let state = self.gather.bytes().len().saturating_sub(1);
            self.at_byte = self.at_byte.saturating_add(state as u64);
            return Some(Event::DeviceState(self.gather.spend(state)));
        }
        if self.gather.is_empty() {
            let taken = take(input, self.tail.find(input));
            self.at_byte = self.at_byte.saturating_add(taken.len() as u64);
            if !taken.is_empty() {
                return Some(Event::DeviceState(taken));
            }
            self.gather.take_all(input);
        }
        while !input.is_empty() {
            let held = self.gather.bytes().len();
            let wanted = tail::wanted_bytes(self.gather.bytes());
            if wanted > held {
                self.gather.fill(wanted, input);
            }
            if wanted <= held || !self.tail.may_be_end(self.gather.bytes()) {
                let later = self.gather.bytes().get(1..).unwrap_or_default();
                let refuted = self.tail.find(later).saturating_add(1);
                self.at_byte = self.at_byte.saturating_add(refuted as u64);
                return Some(Event::DeviceState(self.gather.spend(refuted)));
            }
        }
        None
    }

    /// Whether the device state of a package, of which `left` bytes are left, ends here; decided
    /// when all that may be commands is there.
    fn package_state_ends(&mut self, left: u64, input: &mut &[u8]) -> bool {
        let all = left <= PACKAGE_TAIL_BYTES as u64 && self.gather.fill(left as usize, input);
        if all && tail::package_tail(self.gather.bytes()) as u64 == left {
            self.grammar.end_device_state();
            self.wanted = 0;
            return true;
        }
        false
    }

    /// Hands out device state of a package up to where its last commands may begin.
    fn package_state<'e, 'i: 'e>(
        &'e mut self,
        left: u64,
        input: &mut &'i [u8],
    ) -> Option<Event<'e>> {
        let held = self.gather.bytes().len();
        let taken = if let Some(most @ 1..) = left.checked_sub(PACKAGE_TAIL_BYTES as u64) {
            let most = usize::try_from(most).unwrap_or(usize::MAX);
            if held == 0 { take(input, most) } else { self.gather.spend(most.min(held)) }
        } else if held as u64 == left {
            let commands = tail::package_tail(self.gather.bytes());
            self.gather.spend(held.saturating_sub(commands))
        } else {
            return None;
        };
        if taken.is_empty() {
            return None;
        }
        self.at_byte = self.at_byte.saturating_add(taken.len() as u64);
        Some(Event::DeviceState(taken))
    }
}

/// Takes up to `most` bytes off the front.
fn take<'i>(input: &mut &'i [u8], most: usize) -> &'i [u8] {
    let (taken, rest) = input.split_at(most.min(input.len()));
    *input = rest;
    taken
}
