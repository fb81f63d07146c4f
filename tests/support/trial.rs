//! A test that runs where the machine has what it needs, and says why where it does not.

use libtest_mimic::{Completion, Failed, Trial};

use super::machine::{Need, missing};

/// One test. Without what it needs it is counted as ignored; with `PLYWOOD_REQUIRE_DEVICE` set that is a failure, unless it is
/// the kernel that lacks it.
pub fn trial(name: &str, needs: &'static [Need], body: impl FnOnce() + Send + 'static) -> Trial {
    let shown = name.to_owned();
    Trial::ignorable_test(name, move || {
        if let Some(skip) = missing(needs) {
            let required = std::env::var_os("PLYWOOD_REQUIRE_DEVICE").is_some();
            if required && !skip.excusable {
                return Err(Failed::from(format!("{}, and PLYWOOD_REQUIRE_DEVICE is set", skip.reason)));
            }
            println!("skipped: {shown}: {}", skip.reason);
            return Ok(Completion::ignored_with(skip.reason));
        }
        body();
        Ok(Completion::Completed)
    })
}
