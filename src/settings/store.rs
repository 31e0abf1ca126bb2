//! Where the records are: an SQLite file of one process, or a PostgreSQL database that several daemons share.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use secrecy::{ExposeSecret, SecretString};
use url::Url;

/// The file or database that holds the records.
#[derive(Debug, Clone)]
pub enum StoreLocation {
    /// The path of an SQLite file.
    Sqlite(PathBuf),
    /// A PostgreSQL database, which daemons may share.
    Postgres {
        /// URL of the database, with its password if it was given.
        url: PostgresUrl,
        /// Folder for the batch journals.
        journal: PathBuf,
    },
}

impl StoreLocation {
    /// Parses `sqlite:PATH` or `postgres://...`.
    ///
    /// # Errors
    /// A sentence that says why the text is neither, without a password.
    pub fn parse(text: &str, password: Option<&SecretString>, journal: &Path) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("sqlite:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return match path {
                "" => Err(format!("`{text}` names no file")),
                path => Ok(Self::Sqlite(PathBuf::from(path))),
            };
        }
        let url = text.parse::<PostgresUrl>()?.with_password(password);
        Ok(Self::Postgres { url, journal: journal.to_owned() })
    }

    /// Whether both are the same file, or the same URL and journal folder.
    pub fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Sqlite(one), Self::Sqlite(other)) => one == other,
            (Self::Postgres { url: one, journal }, Self::Postgres { url: other, journal: others }) => {
                one.expose() == other.expose() && journal == others
            }
            _ => false,
        }
    }
}

impl fmt::Display for StoreLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Postgres { url, .. } => url.fmt(f),
        }
    }
}

/// A `postgres://` URL. It takes the parameters of libpq, such as `sslmode`, `sslrootcert` and `application_name`; what it lacks comes
/// from the `PG...` variables and `~/.pgpass`. `Display` and `Debug` show it without its password.
#[derive(Clone)]
pub struct PostgresUrl(SecretString);

impl PostgresUrl {
    /// The whole URL, with its password.
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }

    fn with_password(self, password: Option<&SecretString>) -> Self {
        let (Some(password), Ok(mut url)) = (password, Url::parse(self.expose())) else { return self };
        // Setting it fails for URLs without a host, which name the folder of a socket by a parameter: these take the password as a
        // parameter too.
        if url.set_password(Some(password.expose_secret())).is_err() {
            url.query_pairs_mut().append_pair("password", password.expose_secret());
        }
        Self(SecretString::from(String::from(url)))
    }
}

impl FromStr for PostgresUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || format!("`{}` is neither sqlite:FILE nor postgres://USER@HOST/DATABASE", hide(text));
        let mut url = Url::parse(text).map_err(|_| wanted())?;
        if !matches!(url.scheme(), "postgres" | "postgresql") {
            return Err(wanted());
        }
        if !url.query_pairs().any(|(key, _)| key == "application_name") {
            url.query_pairs_mut().append_pair("application_name", "ttlsweep");
        }
        Ok(Self(SecretString::from(String::from(url))))
    }
}

/// The part of an invalid URL that an error may show: an `@` means that a password may follow the first colon.
fn hide(text: &str) -> &str {
    if text.contains('@') { text.split(':').next().unwrap_or_default() } else { text }
}

impl fmt::Display for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ok(url) = Url::parse(self.expose()) else { return f.write_str("postgres:") };
        let user = Some(url.username()).filter(|user| !user.is_empty()).map(|user| format!("{user}@"));
        let port = url.port().map(|port| format!(":{port}"));
        let host = url.host_str().unwrap_or_default();
        write!(f, "postgres://{}{host}{}{}", user.unwrap_or_default(), port.unwrap_or_default(), url.path())
    }
}

impl fmt::Debug for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, password: Option<&str>) -> Result<StoreLocation, String> {
        StoreLocation::parse(text, password.map(SecretString::from).as_ref(), Path::new("journal"))
    }

    #[test]
    fn a_location_is_shown_without_its_password() {
        for text in
            ["postgres://me:s3cret@db.example:5433/records?sslmode=require", "postgres://me@db.example:5433/records"]
        {
            let location = parse(text, Some("s3cret")).unwrap();
            assert_eq!(location.to_string(), "postgres://me@db.example:5433/records");
            assert!(!format!("{location:?}").contains("s3cret"));
            let StoreLocation::Postgres { url, .. } = location else { panic!("{text}") };
            assert!(url.expose().contains("me:s3cret@") && url.expose().contains("application_name=ttlsweep"));
        }
        assert_eq!(parse("sqlite:/var/lib/x.db", None).unwrap().to_string(), "sqlite:/var/lib/x.db");
    }

    #[test]
    fn what_is_no_location_is_refused_without_a_password_in_the_message() {
        for text in ["mysql://me:s3cret@host/db", "me:s3cret@host", "sqlite:", "records.db"] {
            let error = parse(text, None).unwrap_err();
            assert!(!error.contains("s3cret"), "{error}");
        }
    }
}
