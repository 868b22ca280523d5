-- Takes rollouts off `segments` together with what became of them; each only if it is still pending.
-- An entry that did not come through push_segments is rejected whatever the matcher says: it was never counted
-- and its id may be another's. Its events name it foreign:<entry id>.
-- KEYS[3]  segments     stream  group ARGV[2]
-- KEYS[4]  matched      stream  group `packer`: fields record_id, body (descriptor)
-- KEYS[5]  rejected     stream  dead letters: record_id, reason, detail, source, raw (its first 256 KiB)
-- KEYS[6]  evaluations  stream  results of rollouts that were asked for to evaluate
-- ARGV[2]  group
-- ARGV[3]  oldest policy version that may be trained on
-- ARGV[4]  number of records, then for each, from ARGV[5]: line, first, second
--          line: entry id \t record id \t outcome \t policy version \t bytes of the segment body \t text
--            matched    text: encoded length   first: descriptor body   second: payload body
--            evaluated  text: ""               first: result body       second: ""
--            dropped    text: reason           first: ""                second: ""
--            rejected   text: reason           first: detail            second: raw bytes
-- Reply: one text with a status a record, parted by " ": matched, evaluated, dropped, rejected, or gone (someone
--        else committed it).
local group, oldest, status, bytes, tokens = ARGV[2], tonumber(ARGV[3]), {}, 0, 0
local taken, admitted, payloads = {}, {}, {}
local matched, evaluated, rejected, dropped = {}, {}, {}, {}

local verdicts, by_entry, waiting = {}, {}, {}
for i = 1, tonumber(ARGV[4]) do
  local entry, id, outcome, version, size, text =
    string.match(ARGV[2 + 3 * i], '^(%d+%-%d+)\t([^\t]*)\t(%l+)\t(%d+)\t(%d+)\t(.*)$')
  status[i] = 'gone'
  if not by_entry[entry] then
    verdicts[i] = {entry = entry, id = id, outcome = outcome, version = tonumber(version), size = tonumber(size),
      text = text, first = ARGV[3 + 3 * i], second = ARGV[4 + 3 * i]}
    by_entry[entry] = i
    waiting[#waiting + 1] = entry
  end
end

-- an admitted entry is in `admitted` until it is committed: one look for all instead of an XACK for each
in_chunks(waiting, function(chunk)
  local known = redis.call('SMISMEMBER', PREFIX .. 'admitted', unpack(chunk))
  local ours = {}
  for i, entry in ipairs(chunk) do
    if known[i] == 1 then
      admitted[entry] = true
      ours[#ours + 1] = entry
      taken[#taken + 1] = entry
    elseif redis.call('XACK', KEYS[3], group, entry) == 1 then
      taken[#taken + 1] = entry
    else
      verdicts[by_entry[entry]] = nil
    end
  end
  if #ours > 0 then
    redis.call('XACK', KEYS[3], group, unpack(ours))
    redis.call('SREM', PREFIX .. 'admitted', unpack(ours))
  end
end)

local RAW_KEPT_BYTES = 262144 -- dead letters are outside the byte budget
local function reject(entry, id, event_id, reason, detail, raw)
  redis.call('XADD', KEYS[5], 'MAXLEN', '~', 1000, '*', 'record_id', id, 'reason', reason, 'detail', detail,
    'source', 'segments ' .. entry, 'raw', string.sub(raw, 1, RAW_KEPT_BYTES))
  rejected[#rejected + 1] = event_id .. '\t' .. reason
  count('rejected:' .. reason, 1)
  return 'rejected'
end

local function settle_foreign(verdict)
  local entry, id, event_id = verdict.entry, verdict.id, 'foreign:' .. verdict.entry
  if verdict.outcome == 'rejected' then
    return reject(entry, id, event_id, verdict.text, verdict.first, verdict.second)
  end
  local found = redis.call('XRANGE', KEYS[3], entry, entry)[1]
  return reject(entry, id, event_id, 'not_admitted', 'did not come through push_segments',
    found and fields_of(found)['body'] or '')
end

local function settle(verdict)
  local id, outcome, text, first, second = verdict.id, verdict.outcome, verdict.text, verdict.first, verdict.second
  bytes = bytes - verdict.size
  if outcome == 'matched' and verdict.version < oldest then outcome, text = 'dropped', 'stale' end
  if outcome == 'matched' then
    payloads[#payloads + 1] = PREFIX .. 'payload:' .. id
    payloads[#payloads + 1] = second
    redis.call('XADD', KEYS[4], '*', 'record_id', id, 'body', first)
    matched[#matched + 1] = id .. '\t' .. text
    tokens = tokens + tonumber(text)
    bytes = bytes + #second
  elseif outcome == 'evaluated' then
    redis.call('XADD', KEYS[6], '*', 'record_id', id, 'body', first)
    evaluated[#evaluated + 1] = id
  elseif outcome == 'dropped' then
    dropped[text] = dropped[text] or {}
    table.insert(dropped[text], id)
  else
    return reject(verdict.entry, id, id, text, first, second)
  end
  return outcome
end

for i = 1, #status do
  local verdict = verdicts[i]
  if verdict then status[i] = admitted[verdict.entry] and settle(verdict) or settle_foreign(verdict) end
end
in_chunks(taken, function(chunk) redis.call('XDEL', KEYS[3], unpack(chunk)) end)
in_chunks(payloads, function(chunk) redis.call('MSET', unpack(chunk)) end)
if #matched > 0 then emit('matched', 'records', table.concat(matched, '\n')) end
if #evaluated > 0 then emit('evaluated', 'ids', table.concat(evaluated, ' ')) end
if #rejected > 0 then emit('rejected', 'records', table.concat(rejected, '\n'), 'stage', 'matching') end
for reason, ids in pairs(dropped) do
  emit('dropped', 'reason', reason, 'stage', 'matching', 'ids', table.concat(ids, ' '))
  count('dropped:' .. reason, #ids)
end
count('matched', #matched)
count('matched_tokens', tokens)
count('evaluated', #evaluated)
count('bytes', bytes)
return table.concat(status, ' ')
