//! `Job`: one request, as its attempts see it.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use penstock_core::config::Protocol;

use crate::balance::prefix_affinity::Owner;
use crate::budgets::reservation::Plan;
use crate::capability::Needed;
use crate::choose::Choice;
use crate::openai::{Api, Call};
use crate::passage::Passage;
use crate::principal::Who;
use crate::process::Worker;
use crate::provider::translations::Translations;
use crate::provider::{Misfit, Rest, Route, Translated};
use crate::service::Passing;
use crate::snapshot::{Candidate, Rule};
use crate::wish::{self, BackendModel, Unfit, Wish};

/// Larger bodies are sent once: keeping them until a first byte comes would hold too much memory.
pub(crate) const MAX_REPLAY_BYTES: usize = 1 << 20;
/// What a request asks of its attempts.
pub(crate) struct Job<'a> {
    pub(crate) worker: &'a Arc<Worker>,
    /// The request's id.
    pub(crate) id: HeaderValue,
    /// Who is to pay for it.
    pub(crate) who: Who,
    /// When its head was read.
    pub(crate) started: Instant,
    pub(crate) api: Api,
    /// What follows the path of `api`; empty where that is all.
    pub(crate) below: &'a str,
    pub(crate) headers: &'a HeaderMap,
    /// Where its caller is, if that is another region than the gateway's.
    pub(crate) region: Option<&'a str>,
    pub(crate) body: &'a Bytes,
    pub(crate) call: &'a Call<'a>,
    /// Hashes of the prompt's leading blocks, if the rule's strategy asks for them.
    pub(crate) blocks: Vec<u64>,
    /// Hash of what the rule's strategy keeps together.
    pub(crate) key: Option<u64>,
    /// The request in the protocols of backends that do not speak the caller's.
    pub(crate) translated: Translations,
    /// What it counts in, if it does.
    pub(crate) plan: Option<Plan>,
    /// Set where it is no call of a model.
    pub(crate) passing: Option<&'a Passing<'a>>,
}

impl Job<'_> {
    /// The same request with another body.
    pub(crate) fn with<'a>(&'a self, rule: &Rule, body: &'a Bytes, call: &'a Call<'a>) -> Job<'a> {
        let plan = self.plan.as_ref();
        Job {
            worker: self.worker,
            id: self.id.clone(),
            who: self.who.clone(),
            started: self.started,
            api: self.api,
            below: self.below,
            headers: self.headers,
            region: self.region,
            body,
            call,
            blocks: wish::blocks(rule, call),
            key: self.key,
            translated: Translations::default(),
            plan: plan.map(|plan| plan.with(self.api, call, body)),
            passing: self.passing,
        }
    }

    pub(crate) fn wish<'a>(&'a self, now: Instant, unfit: &'a Unfit) -> Wish<'a> {
        Wish {
            now_ms: self.worker.process.ms(now),
            stream: self.call.stream,
            model: &self.call.model,
            prompt_tokens: self.prompt_tokens(),
            limit_tokens: wish::limit_tokens(self.call),
            answer_tokens: wish::answer_tokens(self.call),
            blocks: &self.blocks,
            key: self.key,
            region: self.region,
            unfit,
        }
    }

    /// How the request reaches a backend of this protocol, and what it is then, if it is not what it was.
    pub(crate) fn route(
        &self,
        protocol: Protocol,
        rest: Rest,
    ) -> Result<(Route, Option<&Translated>), Misfit> {
        let Some(route) = Route::of(self.api, protocol) else {
            return Err(Misfit::Unsupported(self.api.path().to_owned()));
        };
        if route.is_straight() {
            return Ok((route, None));
        }
        let translated = self
            .translated
            .of(protocol, || route.request(self.body, rest));
        translated
            .as_ref()
            .map(|translated| (route, Some(translated)))
            .map_err(Clone::clone)
    }

    /// Who cannot carry the request, as far as its rule's backends say; `trial` is where alone it may go.
    pub(crate) fn unfit(&self, rule: Option<&Rule>, trial: Option<Owner>) -> Unfit {
        Unfit {
            trial,
            needed: rule.map_or(Needed::NOTHING, |rule| {
                Needed::of(rule, self.api, self.call)
            }),
            ..Unfit::default()
        }
    }

    /// Why the chosen candidate cannot carry the request, and who else cannot for the same reason.
    pub(crate) fn misfit(
        &self,
        candidate: &Candidate,
        choice: &Choice,
        rest: Rest,
        unfit: &mut Unfit,
    ) -> Option<Misfit> {
        let backend = &candidate.backend;
        if let Err(why) = self.route(backend.protocol, rest) {
            unfit.protocols.push(backend.protocol);
            return Some(why);
        }
        let model = candidate.model_name(&self.call.model);
        if choice.endpoint.targets.take(model) {
            return None;
        }
        unfit.models.push(BackendModel::of(candidate));
        let expected =
            "a name without empty parts, '.' and '..', because the backend has it in its path";
        Some(Misfit::Invalid("model".to_owned(), expected))
    }

    /// Whether it may go upstream once more though it, or part of it, was there.
    pub(crate) fn may_be_sent_again(&self) -> bool {
        let is_repeatable = self.passing.is_none_or(|passing| passing.is_repeatable);
        is_repeatable && self.body.len() <= MAX_REPLAY_BYTES && self.passage().is_none()
    }

    /// Its body, if that is not kept.
    pub(crate) fn passage(&self) -> Option<&Passage> {
        self.passing?.passage.as_ref()
    }

    /// Whether a part of its body that is not kept went upstream.
    pub(crate) fn is_begun(&self) -> bool {
        self.passage().is_some_and(Passage::is_begun)
    }

    pub(crate) fn prompt_tokens(&self) -> u32 {
        self.call.prompt_tokens
    }
}
