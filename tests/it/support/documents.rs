//! The documents of the repository, with their code: for `tests/docs.rs` too, which needs no server.

use std::path::{Path, PathBuf};

use pulldown_cmark::{CodeBlockKind, Event, Parser, Tag, TagEnd};

/// A code block of a document.
#[derive(Debug)]
pub struct Block {
    /// From the root of the repository.
    pub document: PathBuf,
    /// Empty for a block without one.
    pub language: String,
    pub text: String,
}

/// Every document, by its path from the root of the repository.
pub fn documents() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = files(root);
    let mut folders = vec![root.join("docs"), root.join("deploy")];
    while let Some(folder) = folders.pop() {
        let (inner, found): (Vec<_>, Vec<_>) = files(&folder).into_iter().partition(|path| path.is_dir());
        folders.extend(inner);
        paths.extend(found);
    }
    paths.retain(|path| path.extension().is_some_and(|ext| ext == "md"));
    paths.sort();
    let read =
        |path: &Path| std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    paths.iter().map(|path| (path.strip_prefix(root).expect("below the root").to_owned(), read(path))).collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).expect("a folder").map(|file| file.expect("an entry").path()).collect()
}

/// The code blocks of every document, in their order.
pub fn blocks() -> Vec<Block> {
    let mut blocks = Vec::new();
    for (document, text) in documents() {
        let mut is_inside = false;
        for event in Parser::new(&text) {
            match event {
                Event::Start(Tag::CodeBlock(kind)) => {
                    let language =
                        if let CodeBlockKind::Fenced(info) = kind { info.to_string() } else { String::new() };
                    blocks.push(Block { document: document.clone(), language, text: String::new() });
                    is_inside = true;
                }
                Event::Text(part) if is_inside => blocks.last_mut().expect("it has begun").text.push_str(&part),
                Event::End(TagEnd::CodeBlock) => is_inside = false,
                _ => {}
            }
        }
    }
    blocks
}

/// The code spans of every document that begin with this word and have more words.
pub fn spans(first: &str) -> Vec<(PathBuf, String)> {
    let mut spans = Vec::new();
    for (document, text) in documents() {
        for event in Parser::new(&text) {
            if let Event::Code(code) = event
                && code.split_once(' ').is_some_and(|(word, _)| word == first)
            {
                spans.push((document.clone(), code.to_string()));
            }
        }
    }
    spans
}
