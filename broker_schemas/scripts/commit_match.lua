-- Takes rollouts off `segments` together with what became of them; each only if it is still pending.
-- KEYS[3]  segments     stream  group ARGV[2]
-- KEYS[4]  matched      stream  group `packer`: fields record_id, body (descriptor)
-- KEYS[5]  rejected     stream  dead letters: record_id, reason, detail, source, raw
-- KEYS[6]  evaluations  stream  results of rollouts that were asked for to evaluate
-- ARGV[2]  group
-- ARGV[3]  oldest policy version that may be trained on
-- ARGV[4]  number of records, then for each, from ARGV[5]:
--          entry id, record id, outcome, policy version, bytes of the segment body, text, first, second
--            matched    text: encoded length   first: descriptor body   second: payload body
--            evaluated  text: ""               first: result body       second: ""
--            dropped    text: reason           first: ""                second: ""
--            rejected   text: reason           first: detail            second: raw bytes
-- Reply: a status a record: matched, evaluated, dropped, rejected, or gone (someone else committed it).
local oldest, status = tonumber(ARGV[3]), {}
local matched, evaluated, rejected, dropped, bytes = {}, {}, {}, {}, 0

local function settle(at, id, outcome)
  local text, first, second = ARGV[at + 5], ARGV[at + 6], ARGV[at + 7]
  if outcome == 'matched' and tonumber(ARGV[at + 3]) < oldest then outcome, text = 'dropped', 'stale' end
  if outcome == 'matched' then
    redis.call('SET', PREFIX .. 'payload:' .. id, second)
    redis.call('XADD', KEYS[4], '*', 'record_id', id, 'body', first)
    matched[#matched + 1] = id .. '\t' .. text
    bytes = bytes + #second
  elseif outcome == 'evaluated' then
    redis.call('XADD', KEYS[6], '*', 'record_id', id, 'body', first)
    evaluated[#evaluated + 1] = id
  elseif outcome == 'dropped' then
    dropped[text] = dropped[text] and dropped[text] .. ' ' .. id or id
  else
    redis.call('XADD', KEYS[5], 'MAXLEN', '~', 1000, '*', 'record_id', id, 'reason', text, 'detail', first,
      'source', 'segments ' .. ARGV[at], 'raw', second)
    rejected[#rejected + 1] = id .. '\t' .. text
    count('rejected:' .. text, 1)
  end
  return outcome
end

for i = 0, tonumber(ARGV[4]) - 1 do
  local at = 5 + 8 * i
  if redis.call('XACK', KEYS[3], ARGV[2], ARGV[at]) == 1 then
    redis.call('XDEL', KEYS[3], ARGV[at])
    bytes = bytes - tonumber(ARGV[at + 4])
    status[i + 1] = settle(at, ARGV[at + 1], ARGV[at + 2])
  else
    status[i + 1] = 'gone'
  end
end
if #matched > 0 then emit('matched', 'records', table.concat(matched, '\n')) end
if #evaluated > 0 then emit('evaluated', 'ids', table.concat(evaluated, ' ')) end
if #rejected > 0 then emit('rejected', 'records', table.concat(rejected, '\n'), 'stage', 'matching') end
for reason, ids in pairs(dropped) do drop_segments(ids, reason, 'matching') end
count('matched', #matched)
count('evaluated', #evaluated)
count('bytes', bytes)
return status
