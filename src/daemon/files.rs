//! Checks the settings file together with the TLS files that it names: for `ttlsweep settings check`, and for the daemon
//! before it starts or reloads.

use std::path::Path;

use crate::api::listen;
use crate::node::tls::Tls;
use crate::settings::raw::Problem;
use crate::settings::serve::{self, ApiSettings, Instance, ServeSettings};

/// Reads and checks a settings file and the files that it names.
///
/// # Errors
/// Every problem, with its line.
pub(crate) fn load(path: &Path) -> Result<ServeSettings, Vec<Problem>> {
    serve::load(path, |settings| {
        let mut problems = of_api(&settings.api);
        problems.extend(settings.instances.iter().flat_map(|instance| of_instance(instance)));
        problems
    })
}

fn of_api(api: &ApiSettings) -> Vec<Problem> {
    let Some((cert, key)) = &api.tls else { return Vec::new() };
    let problems = listen::tls(cert, key).err().unwrap_or_default();
    let problems = problems
        .iter()
        .map(|error| Problem { origin: api.lines.get(error.setting()).cloned(), message: error.to_string() });
    problems.collect()
}

fn of_instance(instance: &Instance) -> Vec<Problem> {
    let Some(tls) = &instance.settings.tls else { return Vec::new() };
    let problems = Tls::problems(tls).into_iter().map(|error| {
        // A setting that the file does not give is needed because of the URL: then the URL's line is named.
        let line = error.setting().and_then(|setting| instance.lines.get(setting));
        // The error names the flag of the command line; in the file the setting has no dashes in front.
        let message = error.to_string().trim_start_matches("--").to_owned();
        Problem { origin: line.or_else(|| instance.lines.get("url")).cloned(), message }
    });
    problems.collect()
}
