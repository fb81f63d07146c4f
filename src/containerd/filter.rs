//! The filters of containerd's `List`: `labels."containerd.io/gc.root"==x,kind!=view`.
//!
//! ```text
//! filter    = [ selector *( "," selector ) ]          all must match; nothing: everything matches
//! selector  = fieldpath [ operator value ]            without an operator: the field is there
//! fieldpath = field *( "." field )
//! field     = quoted | 1*( letter | digit | "_" )
//! operator  = "==" | "!=" | "~="                      the last: a regular expression
//! value     = quoted | 1*( anything but white space and "," )
//! quoted    = a string of Go, in " or `; after "~=" also between / or |
//! ```
//! The grammar is that of containerd's package `filters`. Filters come from whoever may connect, so their length is
//! bounded, and so is what a regular expression may take; none makes this panic.

use regex_lite::{Regex, RegexBuilder};

use super::error::{Error, Result};

/// Longest filter in bytes.
const FILTER_BYTES: usize = 16 << 10;
/// Most filters in a request.
const FILTERS: usize = 256;
/// What a compiled regular expression may take.
const REGEX_BYTES: usize = 1 << 20;

/// What filters are about.
pub trait Fields {
    /// The value of a field; none when it is not there.
    fn field(&self, path: &[String]) -> Option<&str>;
}

/// Any number of filters, one of which must match; all match when there is none.
#[derive(Debug, Default)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filters {
    /// Parses filters.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the place where it makes no sense.
    pub fn parse<S: AsRef<str>>(texts: &[S]) -> Result<Self> {
        if texts.len() > FILTERS {
            return Err(Error::Invalid(format!("{} filters; at most {FILTERS} are allowed", texts.len())));
        }
        texts.iter().map(|text| parse(text.as_ref())).collect::<Result<_>>().map(Self)
    }

    /// Whether one of them matches.
    pub fn matches(&self, fields: &impl Fields) -> bool {
        let all = |selectors: &Vec<Selector>| selectors.iter().all(|selector| selector.matches(fields));
        self.0.is_empty() || self.0.iter().any(all)
    }
}

impl Selector {
    fn matches(&self, fields: &impl Fields) -> bool {
        let value = fields.field(&self.path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            // What is not there is the empty string to these two, as with containerd.
            Test::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
            Test::Matches(regex) => regex.is_match(value.unwrap_or_default()),
        }
    }
}

fn parse(text: &str) -> Result<Vec<Selector>> {
    if text.len() > FILTER_BYTES {
        return Err(Error::Invalid(format!("filter of {} bytes; at most {FILTER_BYTES} are allowed", text.len())));
    }
    let mut parser = Parser { text, at: 0 };
    let mut selectors = Vec::new();
    if text.is_empty() {
        return Ok(selectors);
    }
    loop {
        selectors.push(parser.selector()?);
        match parser.next() {
            None => return Ok(selectors),
            Some(',') => {}
            Some(_) => return Err(parser.fault("expected ','")),
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    /// In bytes, at the boundary of a character.
    at: usize,
}

impl Parser<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += next.len_utf8();
        Some(next)
    }

    fn fault(&self, what: &str) -> Error {
        let shown: String = self.text.chars().take(128).collect();
        Error::Invalid(format!("filter {shown:?}: {what} at byte {}", self.at))
    }

    /// Takes the characters from here on for which `is` holds.
    fn take_while(&mut self, is: impl Fn(char) -> bool) -> &str {
        let start = self.at;
        let length = self.rest().find(|character| !is(character)).unwrap_or(self.rest().len());
        self.at += length;
        &self.text[start..self.at]
    }

    fn selector(&mut self) -> Result<Selector> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.next();
            path.push(self.field()?);
        }
        let operator = self.rest().get(..2).unwrap_or_default();
        let test = match operator {
            "==" | "!=" | "~=" => {
                let (equal, not_equal) = (operator == "==", operator == "!=");
                self.at += operator.len();
                if equal {
                    Test::Equal(self.value(false)?)
                } else if not_equal {
                    Test::NotEqual(self.value(false)?)
                } else {
                    self.regex()?
                }
            }
            _ => Test::Present,
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String> {
        if matches!(self.peek(), Some('"' | '`')) {
            return self.quoted();
        }
        let field = self.take_while(|character| character.is_ascii_alphanumeric() || character == '_').to_owned();
        if field.is_empty() { Err(self.fault("expected a field")) } else { Ok(field) }
    }

    fn value(&mut self, is_regex: bool) -> Result<String> {
        match self.peek() {
            Some('"' | '`') => return self.quoted(),
            Some('/' | '|') if is_regex => return self.quoted(),
            _ => {}
        }
        let value = self.take_while(|character| character != ',' && !character.is_whitespace()).to_owned();
        if value.is_empty() { Err(self.fault("expected a value")) } else { Ok(value) }
    }

    fn regex(&mut self) -> Result<Test> {
        let expression = self.value(true)?;
        match RegexBuilder::new(&expression).size_limit(REGEX_BYTES).build() {
            Ok(regex) => Ok(Test::Matches(regex)),
            Err(error) => Err(self.fault(&format!("regular expression: {error}"))),
        }
    }

    /// A string of Go. Between `/` or `|` only the quote itself is escaped: what else a backslash means there is the
    /// regular expression's business.
    fn quoted(&mut self) -> Result<String> {
        let quote = self.next().unwrap_or_default();
        let mut bytes = Vec::new();
        loop {
            let Some(character) = self.next() else { return Err(self.fault("expected the closing quote")) };
            if character == quote {
                break;
            }
            match character {
                '\n' if quote != '`' => return Err(self.fault("line feed in a quoted string")),
                '\\' if quote == '"' => self.escape(&mut bytes)?,
                '\\' if quote != '`' && self.peek() == Some(quote) => {
                    self.next();
                    push(&mut bytes, quote);
                }
                '\\' if quote != '`' => {
                    // Both, so that an escaped backslash does not escape the quote behind it.
                    push(&mut bytes, character);
                    if let Some(escaped) = self.next() {
                        push(&mut bytes, escaped);
                    }
                }
                _ => push(&mut bytes, character),
            }
        }
        String::from_utf8(bytes).map_err(|_| self.fault("quoted string is not UTF-8"))
    }

    fn escape(&mut self, into: &mut Vec<u8>) -> Result<()> {
        let Some(kind) = self.next() else { return Err(self.fault("expected an escape")) };
        let simple = match kind {
            'a' => 0x07,
            'b' => 0x08,
            'f' => 0x0c,
            'n' => b'\n',
            'r' => b'\r',
            't' => b'\t',
            'v' => 0x0b,
            '\\' | '\'' | '"' => kind as u8,
            'x' => self.digits(2, 16)? as u8,
            'u' | 'U' => {
                let number = self.digits(if kind == 'u' { 4 } else { 8 }, 16)?;
                let character = char::from_u32(number).ok_or_else(|| self.fault("escape of no character"))?;
                push(into, character);
                return Ok(());
            }
            '0'..='7' => {
                self.at -= 1;
                let number = self.digits(3, 8)?;
                u8::try_from(number).map_err(|_| self.fault("octal escape above 377"))?
            }
            _ => return Err(self.fault("unknown escape")),
        };
        into.push(simple);
        Ok(())
    }

    fn digits(&mut self, count: usize, radix: u32) -> Result<u32> {
        let digits = self.rest().get(..count).filter(|digits| digits.chars().all(|digit| digit.is_digit(radix)));
        let number = digits.and_then(|digits| u32::from_str_radix(digits, radix).ok());
        let number = number.ok_or_else(|| self.fault("escape is cut short"))?;
        self.at += count;
        Ok(number)
    }
}

fn push(bytes: &mut Vec<u8>, character: char) {
    bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Fields by their joined path.
    struct Map(BTreeMap<String, String>);

    impl Fields for Map {
        fn field(&self, path: &[String]) -> Option<&str> {
            self.0.get(&path.join(".")).map(String::as_str)
        }
    }

    fn fields() -> Map {
        let pairs = [
            ("name", "default/3/sha256:ab"),
            ("parent", ""),
            ("kind", "committed"),
            ("labels.containerd.io/snapshot.ref", "sha256:ab"),
            ("labels.quoted \"key\"", "a,b c"),
            ("labels.plain", "é€"),
        ];
        Map(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into())
    }

    fn matches(filters: &[&str]) -> bool {
        Filters::parse(filters).unwrap_or_else(|error| panic!("{filters:?}: {error}")).matches(&fields())
    }

    #[test]
    fn nothing_matches_everything() {
        assert!(matches(&[]));
        assert!(matches(&[""]));
    }

    #[test]
    fn filters_that_containerd_sends_are_understood() {
        assert!(matches(&["labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"\""]));
        assert!(!matches(&["labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==x"]));
        assert!(!matches(&["labels.\"containerd.io/snapshot.ref\"==sha256:cd,parent==\"\""]));
    }

    #[test]
    fn each_operator_means_what_it_does_to_containerd() {
        for (filter, expected) in [
            ("kind", true),
            ("labels.missing", false),
            ("kind==committed", true),
            ("kind==active", false),
            ("kind!=active", true),
            ("labels.missing!=x", true),
            ("labels.missing!=\"\"", false),
            ("labels.missing==\"\"", false),
            ("parent!=\"\"", false),
            ("name~=^default/", true),
            ("name~=/^default\\/[0-9]+\\//", true),
            ("name~=|sha256:..$|", true),
            ("name~=\"ab$\"", true),
            ("name~=`^k8s`", false),
            ("labels.missing~=^$", true),
            ("labels.\"quoted \\\"key\\\"\"==\"a,b c\"", true),
            ("labels.plain==\"\\u00e9\\xe2\\x82\\254\"", true),
            ("labels.plain==é€", true),
            ("kind==committed,name==x", false),
        ] {
            assert_eq!(matches(&[filter]), expected, "{filter}");
        }
        assert!(matches(&["name==x", "kind==committed"]), "one of several is enough");
        assert!(!matches(&["name==x", "kind==view"]));
    }

    #[test]
    fn bad_syntax_is_refused_with_its_place() {
        for filter in [
            ",",
            "kind==",
            "kind=committed",
            "kind==a b",
            "kind==a,",
            ".kind",
            "labels.",
            "labels..x",
            "\"kind",
            "kind==\"a",
            "kind==\"\\q\"",
            "kind==\"\\x4\"",
            "kind==\"\\ud800\"",
            "kind==\"\\400\"",
            "kind==\"\\xff\"",
            "name~=(",
            "name~=/a",
            " kind",
            "kind ",
            "==x",
            "kind~=a{9999}{9999}",
            "kind==\"a\nb\"",
        ] {
            let refused = Filters::parse(&[filter]).err();
            assert!(
                matches!(&refused, Some(Error::Invalid(text)) if text.contains("at byte")),
                "{filter:?}: {refused:?}"
            );
        }
        assert!(matches!(Filters::parse(&["x".repeat(FILTER_BYTES + 1)]), Err(Error::Invalid(_))));
        assert!(matches!(Filters::parse(&vec!["a"; FILTERS + 1]), Err(Error::Invalid(_))));
    }

    #[test]
    fn quoted_values_of_any_text_come_back() {
        let mut random = fastrand::Rng::with_seed(6);
        for _ in 0..2000 {
            let value: String = (0..random.usize(..20)).map(|_| random.char(..)).collect();
            let escaped: String = value.chars().map(|character| format!("\\U{:08x}", character as u32)).collect();
            let fields = Map([("name".to_owned(), value.clone())].into());
            let filter = format!("name==\"{escaped}\"");
            assert!(Filters::parse(&[&filter]).unwrap().matches(&fields), "{value:?}");
        }
    }

    #[test]
    fn arbitrary_text_is_parsed_or_refused_and_never_panics() {
        const PIECES: [&str; 24] = [
            "name", "labels", ".", ",", "==", "!=", "~=", "\"", "`", "/", "|", "\\", "\\x", "\\u", "4", "é", "\n", " ",
            "(", "*", "{2}", "[", "€", "_",
        ];
        let mut random = fastrand::Rng::with_seed(7);
        let (mut accepted, mut refused) = (0, 0);
        for _ in 0..200_000 {
            let text: String = (0..random.usize(..12)).map(|_| PIECES[random.usize(..PIECES.len())]).collect();
            match Filters::parse(&[&text]) {
                Ok(filters) => {
                    filters.matches(&fields());
                    accepted += 1;
                }
                Err(_) => refused += 1,
            }
        }
        assert!(accepted > 1000 && refused > 1000, "{accepted} accepted, {refused} refused");
    }
}
