//! Values of the label `result`. Pure.

/// What became of a hedge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hedged {
    /// It answered first.
    Won,
    /// The first attempt answered after all.
    Lost,
    /// One of the two failed, and the other one was waited for.
    Failed,
}

impl Hedged {
    /// Value of the label `result`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Won => "won",
            Self::Lost => "lost",
            Self::Failed => "failed",
        }
    }
}

/// What became of a stream that was cut, under a rule that wants such streams rescued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rescued {
    /// Another endpoint goes on with it.
    Joined,
    /// The one that was asked did not.
    Failed,
    /// What it is, or how far it is, cannot be gone on with.
    Unfit,
    /// As many tokens have come as were asked for.
    NoTokens,
    /// No other endpoint of its backend and revision can take it.
    NoEndpoint,
    /// No attempt, no budget for retries or no memory is left for it.
    NoBudget,
}

impl Rescued {
    /// Value of the label `result`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Joined => "joined",
            Self::Failed => "failed",
            Self::Unfit => "unfit",
            Self::NoTokens => "no_tokens",
            Self::NoEndpoint => "no_endpoint",
            Self::NoBudget => "no_budget",
        }
    }
}
