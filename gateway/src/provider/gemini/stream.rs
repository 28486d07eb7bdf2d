//! From Gemini's events to the chunks of a chat completion.

use std::borrow::Cow;

use super::answer::{call, logprobs};
use super::{AnswerIn, CandidateIn, PartIn, UsageIn, finish_reason, usage};
use crate::provider::chat::Delta;
use crate::provider::chunks::{self, Chunks};
use crate::provider::foreign::About;
use crate::sse::{Decoder, EventTooLarge};

/// Gemini makes at most 8 at a time.
const MAX_CANDIDATES: u32 = 64;

/// One stream.
#[derive(Debug)]
pub struct Stream {
    decoder: Decoder,
    chunks: Chunks,
    candidates: Vec<Candidate>,
    usage: Option<UsageIn>,
}

#[derive(Clone, Debug, Default)]
struct Candidate {
    begun: bool,
    /// Calls of tools so far.
    calls: usize,
    finished: bool,
}

impl Stream {
    pub(in crate::provider) fn new(about: &About<'_>) -> Self {
        Self {
            decoder: Decoder::default(),
            chunks: about.chunks(),
            candidates: Vec::new(),
            usage: None,
        }
    }

    pub(in crate::provider) fn feed(
        &mut self,
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), EventTooLarge> {
        let mut decoder = std::mem::take(&mut self.decoder);
        let fed = decoder.feed(bytes, |data, _| self.event(data, out));
        self.decoder = decoder;
        fed.map(|_open_at| ())
    }

    /// The body is over: Gemini's streams have no mark of their end. One whose candidates did not all say why they
    /// ended gets none here either.
    pub(in crate::provider) fn end(&mut self, out: &mut Vec<u8>) {
        let is_whole = self.candidates.iter().all(|candidate| candidate.finished);
        if is_whole && !self.candidates.is_empty() && !self.decoder.is_inside_event() {
            if let Some(counts) = self.usage {
                self.chunks.usage(usage(counts), out);
            }
            chunks::done(out);
        }
    }

    fn event(&mut self, data: &[u8], out: &mut Vec<u8>) {
        let Ok(event) = serde_json::from_slice::<AnswerIn<'_>>(data) else {
            return chunks::error("server_error", "The backend sent what is no answer.", out);
        };
        if let Some(error) = &event.error {
            let kind = error.status.as_deref().unwrap_or("server_error");
            return chunks::error(kind, &error.message, out);
        }
        let is_blocked = event.is_blocked();
        if let Some(id) = event.response_id {
            self.chunks.id = id.into_owned();
        }
        if let Some(model) = event.model_version {
            self.chunks.model = model.into_owned();
        }
        self.usage = event.usage_metadata.or(self.usage);
        if is_blocked {
            self.open(0, out);
            self.finish(0, "content_filter", out);
        }
        for candidate in event.candidates {
            if candidate.index < MAX_CANDIDATES {
                self.candidate(candidate, out);
            }
        }
    }

    /// Choice `index`, begun.
    fn open(&mut self, index: u32, out: &mut Vec<u8>) -> &mut Candidate {
        let at = usize::try_from(index).unwrap_or(0);
        if self.candidates.len() <= at {
            self.candidates.resize(at + 1, Candidate::default());
        }
        let candidate = &mut self.candidates[at];
        if !std::mem::replace(&mut candidate.begun, true) {
            let delta = Delta {
                role: Some("assistant"),
                content: Some(Cow::Borrowed("")),
                ..Delta::default()
            };
            self.chunks.say(index, delta, out);
        }
        candidate
    }

    fn finish(&mut self, index: u32, reason: &'static str, out: &mut Vec<u8>) {
        let candidate = self.open(index, out);
        if !std::mem::replace(&mut candidate.finished, true) {
            self.chunks.finish(index, reason, out);
        }
    }

    fn candidate(&mut self, candidate: CandidateIn<'_>, out: &mut Vec<u8>) {
        let index = candidate.index;
        self.open(index, out);
        for part in candidate
            .content
            .into_iter()
            .flat_map(|content| content.parts)
        {
            self.part(index, part, out);
        }
        if let Some(logprobs) = candidate.logprobs_result.map(logprobs) {
            self.chunks
                .choice(index, Delta::default(), Some(logprobs), None, out);
        }
        if let Some(reason) = candidate.finish_reason {
            let has_calls = self.open(index, out).calls > 0;
            self.finish(index, finish_reason(&reason, has_calls), out);
        }
    }

    fn part(&mut self, index: u32, part: PartIn<'_>, out: &mut Vec<u8>) {
        let text = part.text.filter(|text| !text.is_empty());
        let mut delta = match (part.thought, text) {
            (true, text) => Delta {
                reasoning_content: text,
                ..Delta::default()
            },
            (false, text) => Delta {
                content: text,
                ..Delta::default()
            },
        };
        if let Some(function) = part.function_call {
            let number = self.open(index, out).calls;
            let mut call = call(
                &self.chunks.id,
                index,
                number,
                function,
                part.thought_signature,
            );
            call.index = Some(number);
            delta.tool_calls = vec![call];
            self.open(index, out).calls += 1;
        }
        let says_nothing = delta.content.is_none()
            && delta.reasoning_content.is_none()
            && delta.tool_calls.is_empty();
        if !says_nothing {
            self.chunks.say(index, delta, out);
        }
    }
}
