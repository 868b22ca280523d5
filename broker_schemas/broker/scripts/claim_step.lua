-- Decides an optimizer step once and for ever: B with exactly its packs for every rank, or A, or not yet.
-- KEYS[3]  claims        zset  open claims: optimizer step -> optimizer step
-- KEYS[4]  claim:<step>  hash  kind, reason, policy_version, short, num_segments, event, p:<rank>:<i> pack body, ids:<rank>:<i> its segments,
--                        out:<record id> as in quarantine
-- KEYS[5]  sealed        hash  as in commit_pack
-- ARGV[2]  optimizer step
-- ARGV[3]  kind by the schedule, A or B
-- ARGV[4]  learner world size
-- ARGV[5]  packs a rank needs, the lowest policy versions first; unused in mode sealed
-- ARGV[6]  oldest policy version that may be trained on: older packs are dropped on all ranks first
-- ARGV[7]  current policy version
-- ARGV[8]  mode: fallback (short queue: A), wait (short queue: ask again), sealed (the packs of this step, when complete)
-- ARGV[9]  the last step that the asker was given, or -1: its claim must still be known
-- Reply: the fields of the claim; {} for not yet; {"settled"} for a step a checkpoint has covered already;
--        {"lost"} where the broker has forgotten the claim of ARGV[9]: what it acknowledged is gone.
go_on_at_the_limit()
bound_unkept_log()
local step, world, wanted = tonumber(ARGV[2]), tonumber(ARGV[4]), tonumber(ARGV[5])
local mode = ARGV[8]
local known = redis.call('HGETALL', KEYS[4])
if #known > 0 then return known end
local settled_steps = tonumber(redis.call('HGET', COUNTERS, 'settled_steps') or '0')
if step < settled_steps then return {'settled'} end
local given = tonumber(ARGV[9] or '-1')
if given >= settled_steps and redis.call('EXISTS', PREFIX .. 'claim:' .. given) == 0 then return {'lost'} end

local function ready_key(rank) return PREFIX .. 'ready:' .. rank end

-- packs that an older packer made are sorted in once
local function sort_versions(rank)
  local versions = versions_key(rank)
  if redis.call('ZCARD', versions) == redis.call('XLEN', ready_key(rank)) then return end
  redis.call('UNLINK', versions)
  for _, entry in ipairs(redis.call('XRANGE', ready_key(rank), '-', '+')) do
    redis.call('ZADD', versions, fields_of(entry)['version'], sortable(entry[1]))
  end
end

-- Takes the entries of ready packs out; returns their fields, in the order of `members`.
local function take(rank, members)
  local packs = {}
  for i, member in ipairs(members) do
    local id = entry_of(member)
    packs[i] = fields_of(redis.call('XRANGE', ready_key(rank), id, id)[1])
    redis.call('XDEL', ready_key(rank), id)
    redis.call('ZREM', versions_key(rank), member)
  end
  return packs
end

local function drop_stale()
  for rank = 0, world - 1 do
    sort_versions(rank)
    local stale = redis.call('ZRANGEBYSCORE', versions_key(rank), '-inf', '(' .. ARGV[6])
    for _, pack in ipairs(take(rank, stale)) do drop_segments(pack['ids'], 'stale', 'claim') end
  end
end

local function short_ranks()
  local short = {}
  for rank = 0, world - 1 do
    if redis.call('XLEN', ready_key(rank)) < wanted then short[#short + 1] = rank end
  end
  return short
end

-- The packs of a rank that the step takes, as fields: those that are stale soonest, or all in order.
local function take_packs(rank)
  if mode ~= 'sealed' then return take(rank, redis.call('ZRANGE', versions_key(rank), 0, wanted - 1)) end
  local packs = {}
  for i, entry in ipairs(redis.call('XRANGE', ready_key(rank), '-', '+')) do packs[i] = fields_of(entry) end
  redis.call('UNLINK', ready_key(rank), versions_key(rank))
  return packs
end

local function decide(kind, reason, short)
  local lines, segments = {}, 0
  for rank = 0, world - 1 do
    for i, pack in ipairs(kind == 'B' and take_packs(rank) or {}) do
      redis.call('HSET', KEYS[4], 'p:' .. rank .. ':' .. (i - 1), pack['pack'],
        'ids:' .. rank .. ':' .. (i - 1), pack['ids'])
      lines[#lines + 1] = rank .. '\t' .. pack['id'] .. '\t' .. pack['version'] .. '\t' .. pack['ids']
      local _, gaps = string.gsub(pack['ids'], ' ', '')
      segments = segments + gaps + 1
    end
  end
  local event = emit('claimed', 'optimizer_step', step, 'kind', kind, 'reason', reason,
    'policy_version', ARGV[7], 'short', short, 'packs', table.concat(lines, '\n'))
  redis.call('HSET', KEYS[4], 'kind', kind, 'reason', reason, 'policy_version', ARGV[7], 'short', short,
    'num_segments', segments, 'event', event)
  redis.call('ZADD', KEYS[3], step, step)
  count('steps:' .. kind, 1)
  count('claims:' .. reason, 1)
  count('claimed_segments', segments)
  return redis.call('HGETALL', KEYS[4])
end

-- at an A step too: until they are gone, stale packs pass for depth, and nobody makes fresh ones
if mode ~= 'sealed' then drop_stale() end
if ARGV[3] == 'A' then return decide('A', 'schedule', '') end
if mode == 'sealed' then
  if redis.call('HEXISTS', KEYS[5], step) == 0 then return {} end
  redis.call('HDEL', KEYS[5], step)
  return decide('B', 'claimed', '')
end
local short = short_ranks()
if #short == 0 then return decide('B', 'claimed', '') end
if mode == 'wait' then return {} end
return decide('A', 'queue_short', table.concat(short, ' '))
