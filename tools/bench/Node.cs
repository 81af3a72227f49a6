using System.Text.Json;
using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio;
using Vmm.Migration;
using Vmm.Migration.Channels;
using Vmm.Migration.Engine;
using Vmm.Migration.Status;

namespace Vmm.Tools.Bench;

/// <summary>
/// One end of a measured migration, in its own process so that its CPU time can be measured alone. Reads one line from standard input, <c>listen</c> or
/// the address of the destination, and answers with lines on standard output.
/// </summary>
internal static class Node
{
    internal static int Run(ulong sizeBytes, string? ramFile, bool incoming, bool running, string[] devices, string? address)
    {
        if (devices.Length > 0) Warmup.Run();
        var services = new ServiceCollection();
        services.AddVmm().AddMigration().AddPlugin<VfioPlugin>();
        using ServiceProvider provider = services.BuildServiceProvider();
        using Vm vm = provider.GetRequiredService<VmFactory>().Create(new VmOptions
        {
            IsIncoming = incoming, Devices = [.. devices.Select(DeviceOptions.Parse)],
            Memory = [new RamBlockOptions { Name = "m", SizeBytes = sizeBytes, FilePath = ramFile, Prealloc = true, HugePages = ramFile is null ? true : null }],
        });
        IMigrationEngine engine = vm.Migration();
        engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        engine.Parameters = engine.Parameters with { MaxBandwidthBytesPerSecond = 0, DowntimeLimitMs = devices.Length > 0 ? 600_000UL : engine.Parameters.DowntimeLimitMs };
        if (running) vm.Cont();
        Task<MigrationStatus> task;
        long resident;
        if (incoming)
        {
            task = engine.MigrateIncoming(MigrationAddress.Parse(address ?? "tcp:127.0.0.1:0"));
            Memory.StartPeak();
            resident = Memory.ResidentKiB;
            Console.WriteLine(address ?? $"tcp:127.0.0.1:{engine.Query().SocketAddresses[0].Port}");
        }
        else
        {
            Console.WriteLine("ready");
            string to = Console.ReadLine()!;
            Memory.StartPeak();
            resident = Memory.ResidentKiB;
            task = engine.Migrate(MigrationAddress.Parse(to));
        }
        long before = GC.GetTotalAllocatedBytes(precise: true);
        MigrationStatus status = task.Result;
        MigrationInfo info = engine.Query();
        Console.WriteLine(JsonSerializer.Serialize(new NodeResult(
            status.ToWireName(), info.Error?.ToString(), info.Downtime, info.Ram?.NormalPages ?? 0, GC.GetTotalAllocatedBytes(precise: true) - before,
            Memory.PeakKiB - resident)));
        // The benchmark reads this process's CPU time before it lets the process exit.
        Console.ReadLine();
        return status == MigrationStatus.Completed ? 0 : 1;
    }
}

/// <summary>The result that a node reports.</summary>
internal sealed record NodeResult(string Status, string? Error, DowntimeReport? Downtime, long NormalPages, long AllocatedBytes, long GrowthKiB);
