//! What the file holds, and each call as a change of it. No I/O but through the transaction that comes in; times come
//! in as Unix ms.

use bytes::Bytes;
use redb::{Error, ReadableTable as _, Table, TableDefinition, WriteTransaction};

use crate::store::{Expect, HOUR_MS, Leased, Piece, Versioned};

/// Key → version, end of life, value.
const VALUES: TableDefinition<'_, &str, (u64, u64, &[u8])> = TableDefinition::new("values");
/// Log and number → piece.
const PIECES: TableDefinition<'_, (&str, u64), &[u8]> = TableDefinition::new("pieces");
/// Log → end of life.
const LOGS: TableDefinition<'_, &str, u64> = TableDefinition::new("logs");
/// List, time, member.
const LISTS: TableDefinition<'_, (&str, u64, &str), ()> = TableDefinition::new("lists");
/// List and member → time.
const MEMBERS: TableDefinition<'_, (&str, &str), u64> = TableDefinition::new("members");
/// Class, time from which it may be taken, job.
const DUE: TableDefinition<'_, (&str, u64, &str), ()> = TableDefinition::new("due");
/// Job → time from which it may be taken, attempts, owner.
const JOBS: TableDefinition<'_, &str, (u64, u32, &str)> = TableDefinition::new("jobs");
/// End of life and key of values and logs. What lives longer by now has a later entry.
const ENDS: TableDefinition<'_, (u64, &str), ()> = TableDefinition::new("ends");
/// Share and hour of the end → how much.
const SHARES: TableDefinition<'_, (&str, u64), u64> = TableDefinition::new("shares");
/// Numbers about the whole.
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
const BYTES: &str = "bytes";
const MARK: &str = "mark";

/// What expires in one transaction.
const MAX_SWEPT: usize = 256;

/// Makes the tables of a new file.
pub(super) fn make(tx: &WriteTransaction) -> Result<(), Error> {
    tx.open_table(VALUES)?;
    tx.open_table(PIECES)?;
    tx.open_table(LOGS)?;
    tx.open_table(LISTS)?;
    tx.open_table(MEMBERS)?;
    tx.open_table(DUE)?;
    tx.open_table(JOBS)?;
    tx.open_table(ENDS)?;
    tx.open_table(SHARES)?;
    tx.open_table(NUMBERS)?;
    Ok(())
}

/// Changes something, so that there is something to write.
pub(super) fn mark(tx: &WriteTransaction) -> Result<(), Error> {
    let mut numbers = tx.open_table(NUMBERS)?;
    let before = numbers.get(MARK)?.map_or(0, |mark| mark.value());
    numbers.insert(MARK, before.wrapping_add(1))?;
    Ok(())
}

/// Whether `more` bytes fit into `room` besides what is there.
pub(super) fn has_room(tx: &WriteTransaction, more: usize, room: u64) -> Result<bool, Error> {
    let numbers = tx.open_table(NUMBERS)?;
    let bytes = numbers.get(BYTES)?.map_or(0, |bytes| bytes.value());
    Ok(bytes.saturating_add(length(more)) <= room)
}

fn length(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

fn count(tx: &WriteTransaction, more: u64, less: u64) -> Result<(), Error> {
    let mut numbers = tx.open_table(NUMBERS)?;
    let bytes = numbers.get(BYTES)?.map_or(0, |bytes| bytes.value());
    numbers.insert(BYTES, bytes.saturating_add(more).saturating_sub(less))?;
    Ok(())
}

pub(super) fn get(
    tx: &WriteTransaction,
    key: &str,
    now_ms: u64,
) -> Result<Option<Versioned>, Error> {
    let values = tx.open_table(VALUES)?;
    let found = values.get(key)?;
    Ok(found.and_then(|found| {
        let (version, ends_ms, value) = found.value();
        (ends_ms > now_ms).then(|| Versioned {
            version,
            value: Bytes::copy_from_slice(value),
        })
    }))
}

pub(super) fn put(
    tx: &WriteTransaction,
    key: &str,
    value: &[u8],
    expect: Expect,
    now_ms: u64,
    ends_ms: u64,
) -> Result<Option<u64>, Error> {
    let mut values = tx.open_table(VALUES)?;
    let (before, live, bytes) = match values.get(key)? {
        Some(found) => {
            let (version, ends_ms, value) = found.value();
            (version, ends_ms > now_ms, value.len())
        }
        None => (0, false, 0),
    };
    let seen = if live { before } else { 0 };
    if matches!(expect, Expect::Version(version) if version != seen) {
        return Ok(None);
    }
    let version = before.saturating_add(1);
    values.insert(key, (version, ends_ms, value))?;
    tx.open_table(ENDS)?.insert((ends_ms, key), ())?;
    count(tx, length(value.len()), length(bytes))?;
    Ok(Some(version))
}

/// Removes the value and the log of this name.
pub(super) fn remove(tx: &WriteTransaction, key: &str) -> Result<(), Error> {
    let mut freed = 0;
    if let Some(before) = tx.open_table(VALUES)?.remove(key)? {
        freed += length(before.value().2.len());
    }
    if tx.open_table(LOGS)?.remove(key)?.is_some() {
        let mut pieces = tx.open_table(PIECES)?;
        pieces.retain_in((key, 0)..=(key, u64::MAX), |_, piece| {
            freed += length(piece.len());
            false
        })?;
    }
    if freed > 0 {
        count(tx, 0, freed)?;
    }
    Ok(())
}

pub(super) fn write(
    tx: &WriteTransaction,
    log: &str,
    pieces: &[Piece],
    ends_ms: u64,
) -> Result<(), Error> {
    let mut table = tx.open_table(PIECES)?;
    let (mut more, mut less) = (0, 0);
    for (number, piece) in pieces {
        more += length(piece.len());
        if let Some(before) = table.insert((log, *number), &piece[..])? {
            less += length(before.value().len());
        }
    }
    tx.open_table(LOGS)?.insert(log, ends_ms)?;
    tx.open_table(ENDS)?.insert((ends_ms, log), ())?;
    count(tx, more, less)
}

pub(super) fn pieces(
    tx: &WriteTransaction,
    log: &str,
    from: u64,
    most: u64,
    now_ms: u64,
) -> Result<Vec<Piece>, Error> {
    let ends_ms = tx
        .open_table(LOGS)?
        .get(log)?
        .map_or(0, |ends| ends.value());
    if ends_ms <= now_ms {
        return Ok(Vec::new());
    }
    let table = tx.open_table(PIECES)?;
    let found = table.range((log, from)..(log, from.saturating_add(most)))?;
    found
        .map(|entry| {
            let (key, piece) = entry?;
            Ok((key.value().1, Bytes::copy_from_slice(piece.value())))
        })
        .collect()
}

pub(super) fn enlist(
    tx: &WriteTransaction,
    list: &str,
    member: &str,
    at_ms: u64,
    oldest_ms: u64,
) -> Result<(), Error> {
    let mut lists = tx.open_table(LISTS)?;
    let mut members = tx.open_table(MEMBERS)?;
    if let Some(before) = members.insert((list, member), at_ms)? {
        lists.remove((list, before.value(), member))?;
    }
    lists.insert((list, at_ms, member), ())?;
    lists.retain_in((list, 0, "")..(list, oldest_ms, ""), |(_, _, old), ()| {
        // A member that cannot be removed is one that is not there.
        let _ = members.remove((list, old));
        false
    })?;
    Ok(())
}

pub(super) fn unlist(tx: &WriteTransaction, list: &str, member: &str) -> Result<(), Error> {
    let mut lists = tx.open_table(LISTS)?;
    if let Some(at_ms) = tx.open_table(MEMBERS)?.remove((list, member))? {
        lists.remove((list, at_ms.value(), member))?;
    }
    Ok(())
}

pub(super) fn listed(
    tx: &WriteTransaction,
    list: &str,
    after: Option<&str>,
    newest_first: bool,
    most: usize,
) -> Result<Vec<String>, Error> {
    let lists = tx.open_table(LISTS)?;
    let behind = match after {
        None => None,
        Some(after) => match tx.open_table(MEMBERS)?.get((list, after))? {
            Some(at_ms) => Some((at_ms.value(), after)),
            None => return Ok(Vec::new()),
        },
    };
    let (low, high) = match (behind, newest_first) {
        (None, _) => ((0, ""), (u64::MAX, "")),
        (Some(last), true) => ((0, ""), last),
        (Some(last), false) => (last, (u64::MAX, "")),
    };
    let mut range = lists.range((list, low.0, low.1)..(list, high.0, high.1))?;
    let mut found = Vec::new();
    while found.len() < most {
        let next = if newest_first {
            range.next_back()
        } else {
            range.next()
        };
        let Some(entry) = next else { break };
        let (key, ()) = entry.map(|(key, unit)| (key, unit.value()))?;
        let member = key.value().2;
        if Some(member) != after {
            found.push(member.to_owned());
        }
    }
    Ok(found)
}

type Jobs<'a> = Table<'a, &'static str, (u64, u32, &'static str)>;

/// Time, attempts and owner of a job.
fn job_of(jobs: &Jobs<'_>, job: &str) -> Result<Option<(u64, u32, String)>, Error> {
    Ok(jobs.get(job)?.map(|found| {
        let (due_ms, attempts, owner) = found.value();
        (due_ms, attempts, owner.to_owned())
    }))
}

pub(super) fn enqueue(
    tx: &WriteTransaction,
    class: &str,
    job: &str,
    most: u64,
    now_ms: u64,
) -> Result<bool, Error> {
    use redb::ReadableTableMetadata as _;
    let mut jobs = tx.open_table(JOBS)?;
    if jobs.len()? >= most {
        return Ok(false);
    }
    jobs.insert(job, (now_ms, 0, ""))?;
    tx.open_table(DUE)?.insert((class, now_ms, job), ())?;
    Ok(true)
}

pub(super) fn classes(tx: &WriteTransaction) -> Result<Vec<String>, Error> {
    let due = tx.open_table(DUE)?;
    let mut found: Vec<String> = Vec::new();
    // From each class to the first entry behind its last one.
    loop {
        let from = found.last().map_or("", String::as_str);
        let start = if found.is_empty() {
            ("", 0, "")
        } else {
            (from, u64::MAX, "")
        };
        let next = match due.range(start..)?.next() {
            Some(entry) => entry?.0.value().0.to_owned(),
            None => return Ok(found),
        };
        found.push(next);
    }
}

pub(super) fn lease(
    tx: &WriteTransaction,
    class: &str,
    owner: &str,
    now_ms: u64,
    until_ms: u64,
) -> Result<Option<Leased>, Error> {
    let mut due = tx.open_table(DUE)?;
    let first = match due.range((class, 0, "")..(class, now_ms + 1, ""))?.next() {
        Some(entry) => {
            let key = entry?.0;
            let (_, due_ms, job) = key.value();
            (due_ms, job.to_owned())
        }
        None => return Ok(None),
    };
    let (due_ms, job) = first;
    due.remove((class, due_ms, job.as_str()))?;
    let mut jobs = tx.open_table(JOBS)?;
    let attempts = job_of(&jobs, &job)?.map_or(0, |(_, attempts, _)| attempts);
    let attempt = attempts.saturating_add(1);
    jobs.insert(job.as_str(), (until_ms, attempt, owner))?;
    due.insert((class, until_ms, job.as_str()), ())?;
    Ok(Some(Leased { job, attempt }))
}

/// What becomes of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    Keep,
    GiveBack { counted: bool },
}

/// Changes a lease that `owner` has; `false` if it has not.
pub(super) fn hold(
    tx: &WriteTransaction,
    class: &str,
    job: &str,
    owner: &str,
    at_ms: u64,
    hold: Hold,
) -> Result<bool, Error> {
    let mut jobs = tx.open_table(JOBS)?;
    let Some((due_ms, attempts, _)) = job_of(&jobs, job)?.filter(|(_, _, of)| of.as_str() == owner)
    else {
        return Ok(false);
    };
    let mut due = tx.open_table(DUE)?;
    due.remove((class, due_ms, job))?;
    due.insert((class, at_ms, job), ())?;
    let (attempts, owner) = match hold {
        Hold::Keep => (attempts, owner),
        Hold::GiveBack { counted: true } => (attempts, ""),
        Hold::GiveBack { counted: false } => (attempts.saturating_sub(1), ""),
    };
    jobs.insert(job, (at_ms, attempts, owner))?;
    Ok(true)
}

pub(super) fn withdraw(tx: &WriteTransaction, class: &str, job: &str) -> Result<bool, Error> {
    let mut jobs = tx.open_table(JOBS)?;
    let Some((due_ms, ..)) = job_of(&jobs, job)? else {
        return Ok(false);
    };
    tx.open_table(DUE)?.remove((class, due_ms, job))?;
    jobs.remove(job)?;
    Ok(true)
}

pub(super) fn claim(
    tx: &WriteTransaction,
    share: &str,
    amount: u64,
    hour: u64,
    this_hour: u64,
    most: u64,
) -> Result<bool, Error> {
    let mut shares = tx.open_table(SHARES)?;
    shares.retain_in((share, 0)..=(share, this_hour), |_, _| false)?;
    let mut held = 0_u64;
    for entry in shares.range((share, 0)..=(share, u64::MAX))? {
        held = held.saturating_add(entry?.1.value());
    }
    if held.saturating_add(amount) > most {
        return Ok(false);
    }
    let before = shares.get((share, hour))?.map_or(0, |held| held.value());
    shares.insert((share, hour), before.saturating_add(amount))?;
    let ends_ms = hour.saturating_mul(HOUR_MS);
    tx.open_table(ENDS)?.insert((ends_ms, share), ())?;
    Ok(true)
}

pub(super) fn unclaim(
    tx: &WriteTransaction,
    share: &str,
    amount: u64,
    hour: u64,
) -> Result<(), Error> {
    let mut shares = tx.open_table(SHARES)?;
    let before = shares.get((share, hour))?.map_or(0, |held| held.value());
    match before.saturating_sub(amount) {
        0 => shares.remove((share, hour))?,
        left => shares.insert((share, hour), left)?,
    };
    Ok(())
}

/// Removes what has come to its end; returns how many ends were looked at.
pub(super) fn sweep(tx: &WriteTransaction, now_ms: u64) -> Result<usize, Error> {
    let mut ends = tx.open_table(ENDS)?;
    let mut over: Vec<(u64, String)> = Vec::new();
    for entry in ends.range((0, "")..(now_ms, ""))?.take(MAX_SWEPT) {
        let (key, _) = entry?;
        let (at_ms, name) = key.value();
        over.push((at_ms, name.to_owned()));
    }
    for (at_ms, name) in &over {
        ends.remove((*at_ms, name.as_str()))?;
        let hours = (name.as_str(), 0)..=(name.as_str(), *at_ms / HOUR_MS);
        tx.open_table(SHARES)?.retain_in(hours, |_, _| false)?;
        let ends_ms = {
            let values = tx.open_table(VALUES)?;
            let value_ms = values
                .get(name.as_str())?
                .map_or(0, |found| found.value().1);
            let logs = tx.open_table(LOGS)?;
            let log_ms = logs.get(name.as_str())?.map_or(0, |ends| ends.value());
            value_ms.max(log_ms)
        };
        if ends_ms <= now_ms {
            remove(tx, name)?;
        }
    }
    Ok(over.len())
}
