//! Stores of a guest's pages on memory servers: where they are, and ways to them.

use std::net::SocketAddr;

use transport::messages::Store;
use transport::pages::{
    NewStore, PageAnswer, PageClient, PageRequest, StoreError, StoreId, StoreSecret,
};
use transport::{Identity, Options};

use crate::error::EngineError;
use crate::random;

/// Makes a store on the server at `address` for a guest of `pages` pages, that this host may use and
/// `another`. Blocks.
///
/// # Errors
/// [`EngineError::NoStore`] with the server's address: it is not reached, or does not have the room.
pub fn create(
    (address, resolved): (&str, SocketAddr),
    identity: &Identity,
    options: &Options,
    (vm, pages, reserve_pages): (&str, u64, u64),
    another: Option<&str>,
) -> Result<(Store, PageClient), EngineError> {
    let failed = |source| no_store(address, source);
    // The option names the destination.
    let mut client = PageClient::connect(resolved, identity, None, options).map_err(failed)?;
    let (id, secret) = (random::bytes()?, random::bytes()?);
    let name = client.peer().to_owned();
    let request = PageRequest::Create(NewStore {
        store: StoreId(id),
        secret: StoreSecret::new(secret),
        vm: vm.to_owned(),
        pages,
        reserve_pages,
        hosts: another.map(str::to_owned).into_iter().collect(),
    });
    ask(&mut client, address, &request)?;
    Ok((Store { address: resolved.to_string(), name, id, secret, reserve_pages }, client))
}

/// A connection to a store that exists. Blocks.
///
/// # Errors
/// [`EngineError::NoStore`].
pub fn open(
    store: &Store,
    identity: &Identity,
    options: &Options,
) -> Result<PageClient, EngineError> {
    let address: SocketAddr = store.address.parse().map_err(|_| {
        EngineError::Contradiction(format!("{:?} as a memory server's address", store.address))
    })?;
    let connected = PageClient::connect(address, identity, Some(&store.name), options);
    let mut client = connected.map_err(|source| no_store(&store.address, source))?;
    let request =
        PageRequest::Open { store: StoreId(store.id), secret: StoreSecret::new(store.secret) };
    ask(&mut client, &store.address, &request)?;
    Ok(client)
}

/// Has a server do something that it answers by a word. Blocks.
///
/// # Errors
/// As [`call`].
pub fn ask(
    client: &mut PageClient,
    address: &str,
    request: &PageRequest,
) -> Result<(), EngineError> {
    call(client, address, request).map(drop)
}

/// Has a server do something and returns its answer, which is no refusal. Blocks.
///
/// # Errors
/// [`EngineError::NoStore`], or [`EngineError::StoreRefused`].
pub fn call(
    client: &mut PageClient,
    address: &str,
    request: &PageRequest,
) -> Result<PageAnswer, EngineError> {
    match client.call(request).map_err(|source| no_store(address, source))? {
        PageAnswer::Failed { error, .. } => Err(refused(address, error)),
        answer => Ok(answer),
    }
}

/// What goes wrong on the way to a memory server.
pub fn no_store(address: &str, source: transport::TransportError) -> EngineError {
    EngineError::NoStore { address: address.to_owned(), source: Box::new(source) }
}

/// What a memory server says against a request.
pub fn refused(address: &str, source: StoreError) -> EngineError {
    EngineError::StoreRefused { address: address.to_owned(), source }
}
