-- Takes rollouts off `segments` together with what became of them; each only if it is still pending.
-- A payload was set at made:<record id> just before in the same transaction: it is linked to payload:<record id>
-- when its record is matched and let go when not, and never passes through here.
-- An entry that did not come through push_segments is rejected whatever the matcher says: it was never counted
-- and its id may be another's. Its events name it foreign:<entry id>.
-- KEYS[3]  segments     stream  group ARGV[2]
-- KEYS[4]  matched      stream  group `packer`: schema_version, record_id, policy_version, encoded_length, optimizer_step
-- KEYS[5]  rejected     stream  dead letters: record_id, reason, detail, source, raw (its first 256 KiB)
-- KEYS[6]  evaluations  stream  results of rollouts that were asked for to evaluate: record_id, body; counted bytes
-- ARGV[2]  group
-- ARGV[3]  oldest policy version that may be trained on
-- ARGV[4]  number of records, then for each, from ARGV[5]: line, extra
--          line: entry id \t record id \t outcome \t policy version \t bytes of the rollout's body \t step \t text
--            matched    text: encoded length   extra: ""
--            evaluated  text: ""               extra: result body
--            dropped    text: reason           extra: ""
--            rejected   text: reason           extra: detail
--          step: the optimizer step that asked for it, or -1
-- Reply: one text with a status a record, parted by " ": matched, evaluated, dropped, rejected, no_body (nothing at
--        made:<record id>; it stays pending), or gone (someone else committed it).
go_on_at_the_limit()
local group, oldest, status, bytes, tokens = ARGV[2], tonumber(ARGV[3]), {}, 0, 0
local MADE, BODY, PAYLOAD = PREFIX .. 'made:', PREFIX .. 'body:', PREFIX .. 'payload:'
local taken, foreign, admitted, linked, unwanted = {}, {}, {}, {}, {}
local matched, evaluated, rejected, dropped = {}, {}, {}, {}
local made_bytes = 0

local verdicts, by_entry, waiting = {}, {}, {}
for i = 1, tonumber(ARGV[4]) do
  local entry, id, outcome, version, size, step, text =
    string.match(ARGV[3 + 2 * i], '^(%d+%-%d+)\t([^\t]*)\t(%l+)\t(%d+)\t(%d+)\t(%-?%d+)\t(.*)$')
  status[i] = 'gone'
  if not by_entry[entry] then
    local verdict = {entry = entry, id = id, outcome = outcome, version = version, size = tonumber(size),
      step = step, text = text, extra = ARGV[4 + 2 * i], made = 0}
    by_entry[entry] = i
    if outcome == 'matched' then verdict.made = redis.call('STRLEN', MADE .. id) end
    if outcome == 'matched' and verdict.made == 0 then
      status[i] = 'no_body'
    else
      verdicts[i] = verdict
      waiting[#waiting + 1] = entry
    end
  elseif outcome == 'matched' then -- said twice in one call
    unwanted[#unwanted + 1] = MADE .. id
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
      foreign[#foreign + 1] = entry
    else
      local verdict = verdicts[by_entry[entry]]
      if verdict.outcome == 'matched' then unwanted[#unwanted + 1] = MADE .. verdict.id end
      verdicts[by_entry[entry]] = nil
    end
  end
  if #ours > 0 then redis.call('SREM', PREFIX .. 'admitted', unpack(ours)) end
end)

local RAW_KEPT_BYTES = 262144 -- dead letters are outside the byte budget
local function raw_of(verdict)
  local raw = admitted[verdict.entry] and redis.call('GETRANGE', BODY .. verdict.id, 0, RAW_KEPT_BYTES - 1) or ''
  if raw ~= '' then return raw end
  local found = redis.call('XRANGE', KEYS[3], verdict.entry, verdict.entry)[1] -- version 1 has it in the entry
  return string.sub(found and fields_of(found)['body'] or '', 1, RAW_KEPT_BYTES)
end

-- The entry says what its rollout was for; the caller of this script need not be believed.
local function lane_of_entry(verdict)
  local found = admitted[verdict.entry] and redis.call('XRANGE', KEYS[3], verdict.entry, verdict.entry)[1]
  local columns = found and fields_of(found)['line'] or ''
  return lane_of(string.match(columns, '^[^\t]*\t%d+\t[^\t]*\t%d+\t[^\t]*\t[^\t]*\t%d+\t([^\t]*)\t'))
end

local apart, no_answer = {}, 0
local function count_apart(lane, name)
  apart[lane .. name] = (apart[lane .. name] or 0) + 1
  if lane ~= '' then no_answer = no_answer + 1 end
end

-- Without an evaluator nobody takes results away: the oldest go.
local MOST_RESULTS = 50000
local function add_result(id, body)
  redis.call('XADD', KEYS[6], '*', 'record_id', id, 'body', body)
  bytes = bytes + #body
  local over = redis.call('XLEN', KEYS[6]) - MOST_RESULTS
  if over <= 0 then return end
  for _, entry in ipairs(redis.call('XRANGE', KEYS[6], '-', '+', 'COUNT', over)) do
    bytes = bytes - #(fields_of(entry)['body'] or '')
    redis.call('XDEL', KEYS[6], entry[1])
  end
end

local function reject(verdict, event_id, reason, detail)
  redis.call('XADD', KEYS[5], 'MAXLEN', '~', 1000, '*', 'record_id', verdict.id, 'reason', reason,
    'detail', detail, 'source', 'segments ' .. verdict.entry, 'raw', raw_of(verdict))
  rejected[#rejected + 1] = event_id .. '\t' .. reason
  count_apart(lane_of_entry(verdict), 'rejected:' .. reason)
  return 'rejected'
end

local function settle_foreign(verdict)
  local event_id = 'foreign:' .. verdict.entry
  if verdict.outcome == 'matched' then unwanted[#unwanted + 1] = MADE .. verdict.id end
  if verdict.outcome == 'rejected' then return reject(verdict, event_id, verdict.text, verdict.extra) end
  return reject(verdict, event_id, 'not_admitted', 'did not come through push_segments')
end

local function settle(verdict)
  local id, outcome, text = verdict.id, verdict.outcome, verdict.text
  bytes = bytes - verdict.size
  if outcome == 'matched' and tonumber(verdict.version) < oldest then
    outcome, text = 'dropped', 'stale'
    unwanted[#unwanted + 1] = MADE .. id
  end
  if outcome == 'matched' and linked[id] then outcome, text = 'dropped', 'duplicate' end
  if outcome == 'matched' then
    linked[id] = true
    redis.call('RENAME', MADE .. id, PAYLOAD .. id)
    redis.call('XADD', KEYS[4], '*', 'schema_version', '2', 'record_id', id, 'policy_version', verdict.version,
      'encoded_length', text, 'optimizer_step', verdict.step)
    matched[#matched + 1] = id .. '\t' .. text
    tokens = tokens + tonumber(text)
    bytes, made_bytes = bytes + verdict.made, made_bytes + verdict.made
  elseif outcome == 'evaluated' then
    add_result(id, verdict.extra)
    evaluated[#evaluated + 1] = id
  elseif outcome == 'dropped' then
    dropped[text] = dropped[text] or {}
    table.insert(dropped[text], id)
    count_apart(lane_of_entry(verdict), 'dropped:' .. text)
  else
    reject(verdict, id, text, verdict.extra)
  end
  unwanted[#unwanted + 1] = BODY .. id
  return outcome
end

for i = 1, #status do
  local verdict = verdicts[i]
  if verdict then status[i] = admitted[verdict.entry] and settle(verdict) or settle_foreign(verdict) end
end
in_chunks(foreign, function(chunk) redis.call('XDEL', KEYS[3], unpack(chunk)) end)
take_off(KEYS[3], group, taken)
in_chunks(unwanted, function(chunk) redis.call('UNLINK', unpack(chunk)) end)
if #matched > 0 then emit('matched', 'records', table.concat(matched, '\n')) end
if #evaluated > 0 then emit('evaluated', 'ids', table.concat(evaluated, ' ')) end
if #rejected > 0 then emit('rejected', 'records', table.concat(rejected, '\n'), 'stage', 'matching') end
for reason, ids in pairs(dropped) do
  emit('dropped', 'reason', reason, 'stage', 'matching', 'ids', table.concat(ids, ' '))
end
count('matched', #matched)
count('matched_tokens', tokens)
count('payloads', #matched)
count('payload_bytes', made_bytes)
count('evaluated', #evaluated)
count('evaluation_waiting', -#evaluated - no_answer)
for name, num in pairs(apart) do count(name, num) end
count('bytes', bytes)
return table.concat(status, ' ')
