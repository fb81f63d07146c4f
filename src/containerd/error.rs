//! What can come of a call, and the gRPC code that containerd expects for it.

use tonic::{Code, Status};

use crate::daemon::protocol::{Failure, Kind};

/// Result of a call.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call was refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no such snapshot.
    #[error("{0}")]
    NotFound(String),
    /// The key or name is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The snapshot's state does not allow it.
    #[error("{0}")]
    Precondition(String),
    /// It can never be right.
    #[error("{0}")]
    Invalid(String),
    /// The pool's daemon cannot be reached or started now.
    #[error("{0}")]
    Unavailable(String),
    /// What the pool answered.
    #[error("{0}")]
    Pool(#[from] Failure),
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::NotFound(_) => Code::NotFound,
            Error::AlreadyExists(_) => Code::AlreadyExists,
            Error::Precondition(_) => Code::FailedPrecondition,
            Error::Invalid(_) => Code::InvalidArgument,
            Error::Unavailable(_) => Code::Unavailable,
            Error::Pool(failure) => match failure.kind {
                Kind::NotFound => Code::NotFound,
                Kind::AlreadyExists => Code::AlreadyExists,
                // In use, or protected by its owner: one such snapshot must not end a whole collection of garbage.
                Kind::Busy | Kind::ReadOnly | Kind::Unfinished | Kind::Incompatible => Code::FailedPrecondition,
                Kind::InvalidInput => Code::InvalidArgument,
                Kind::NoSpace => Code::ResourceExhausted,
                Kind::Poisoned => Code::Unavailable,
                Kind::Corrupt => Code::DataLoss,
                Kind::Io => Code::Internal,
            },
        };
        Self::new(code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_that_containerd_knows() {
        let word = || "x".to_owned();
        for (error, code) in [
            (Error::NotFound(word()), Code::NotFound),
            (Error::AlreadyExists(word()), Code::AlreadyExists),
            (Error::Precondition(word()), Code::FailedPrecondition),
            (Error::Invalid(word()), Code::InvalidArgument),
            (Error::Unavailable(word()), Code::Unavailable),
            (Failure::new(Kind::Busy, "x").into(), Code::FailedPrecondition),
            (Failure::new(Kind::NoSpace, "x").into(), Code::ResourceExhausted),
            (Failure::new(Kind::InvalidInput, "x").into(), Code::InvalidArgument),
        ] {
            let status = Status::from(error);
            assert_eq!((status.code(), status.message()), (code, "x"));
        }
    }
}
